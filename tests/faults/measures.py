"""What keeps a run from losing anything, measure by measure: how each is switched off, and which tests must then fail.

A measure that nobody would miss is none: ``test_of_tests.py`` switches them off one at a time.
"""

from __future__ import annotations

from typing import NamedTuple


class Measure(NamedTuple):
    """One safety measure."""

    name: str
    file: str
    """In the package."""
    old: str
    """Text that stands there once."""
    new: str
    """Text in its place, with which the measure does nothing."""
    test: str
    """Of ``tests/``: fails without the measure."""


DAMAGE, FOLDER, BEGIN, OUTPUT = (
    "checkpoint/test_damage.py::test_",
    "checkpoint/test_folder.py::test_",
    "train/test_begin.py::test_",
    "train/test_output.py::test_",
)
SYNCED = f"{FOLDER}files_are_synced_before_the_rename_and_the_parent_after"
MEASURES = (
    # ---- what a checkpoint says of itself ----
    Measure(
        "hash of a tensor",
        "checkpoint/read.py",
        "    if found != saved.hash:",
        "    if False:",
        f"{DAMAGE}one_flipped_bit_anywhere_is_noticed",
    ),
    Measure(
        "hash of a file's header",
        "checkpoint/tensor_files.py",
        "if header_hash is not None and hash_bytes(start + text) != header_hash:",
        "if False:",
        f"{DAMAGE}size_and_header_are_those_of_the_manifest",
    ),
    Measure(
        "size of a file",
        "checkpoint/tensor_files.py",
        "if size is not None and size != self.size:",
        "if False:",
        f"{DAMAGE}size_and_header_are_those_of_the_manifest",
    ),
    Measure(
        "no gap in a file",
        "checkpoint/tensor_files.py",
        "            if entry.offset != position:",
        "            if False:",
        f"{DAMAGE}a_hostile_tensor_file_header_is_refused",
    ),
    Measure(
        "digest of a manifest",
        "checkpoint/manifest.py",
        "if canonical != text or claimed != hash_bytes(canonical_json(tree)):",
        "if False:",
        f"{DAMAGE}one_flipped_bit_anywhere_is_noticed",
    ),
    Measure(
        "slices tile their tensors",
        "checkpoint/manifest.py",
        "        if overlap or missing:",
        "        if False:",
        f"{FOLDER}incomplete_slices_are_not_committed",
    ),
    Measure(
        "the folder's step is the manifest's",
        "checkpoint/manifest.py",
        "if named is not None and int(named[1]) != manifest.step:",
        "if False:",
        f"{DAMAGE}a_manifest_of_another_step_is_noticed",
    ),
    Measure(
        "names lead nowhere else",
        "checkpoint/manifest.py",
        "if not isinstance(value, str) or form.fullmatch(value) is None:",
        "if not isinstance(value, str):",
        f"{DAMAGE}a_file_name_that_could_lead_elsewhere_is_refused",
    ),
    Measure(
        "tokenizer of a checkpoint",
        "checkpoint/manifest.py",
        "same = hash_content(file) == hashed",
        "same = True",
        f"{DAMAGE}one_flipped_bit_anywhere_is_noticed",
    ),
    Measure(
        "no link in a checkpoint",
        "checkpoint/tensor_files.py",
        "return reading.open_regular(path, follow=False)",
        "return reading.open_regular(path)",
        f"{DAMAGE}what_is_not_a_plain_file_is_refused",
    ),
    # ---- how one is written ----
    Measure(
        "reading back what was written",
        "checkpoint/commit.py",
        "if reader.hash_of(wanted.key) != hashed:",
        "if False:",
        f"{DAMAGE}the_hash_is_of_memory_and_a_lying_disk_is_noticed",
    ),
    Measure("fsync of tensors", "checkpoint/direct.py", "                sync(self._descriptor)\n", "", SYNCED),
    Measure(
        "fsync of the manifest",
        "base/files.py",
        "        file.flush()\n        sync(file.fileno())\n",
        "        file.flush()\n",
        SYNCED,
    ),
    Measure("fsync of the tokenizer", "checkpoint/commit.py", "        sync_file(path)\n", "        pass\n", SYNCED),
    Measure(
        "fsync of the staging folder", "base/files.py", "    sync_folder(staged)\n    old = ", "    old = ", SYNCED
    ),
    Measure(
        "fsync after the rename",
        "base/files.py",
        "    sync_folder(target.parent)\n    return old",
        "    return old",
        SYNCED,
    ),
    Measure(
        "one rename makes the checkpoint",
        "base/files.py",
        "        os.rename(staged, target)\n    except OSError:",
        "        shutil.copytree(staged, target)\n        shutil.rmtree(staged)\n    except OSError:",
        "faults/test_kills.py::test_a_kill_before_any_operation_of_a_save",
    ),
    Measure(
        "the old one comes back where the rename fails",
        "base/files.py",
        "        if old is not None:\n            os.rename(old, target)\n        raise",
        "        raise",
        f"{FOLDER}replacing_keeps_the_old_when_the_rename_fails",
    ),
    Measure(
        "metrics are durable before a commit",
        "train/saver.py",
        "        self._sync()\n",
        "",
        f"{OUTPUT}names_are_durable_before_the_first_checkpoint",
    ),
    Measure(
        "space is asked for, blocking",
        "checkpoint/write.py",
        "        check_space(folder, needed, ctx.world.size)\n",
        "",
        "train/test_saver.py::test_a_checkpoint_that_does_not_fit_is_not_begun",
    ),
    Measure(
        "space is asked for, background",
        "checkpoint/background.py",
        "            check_space(self._folder, self._needed, self._ctx.world.size)\n",
        "",
        "train/test_saver.py::test_a_checkpoint_that_does_not_fit_is_not_begun",
    ),
    Measure(
        "deadline of a background save",
        "checkpoint/background.py",
        "if writer.error is None and time.monotonic() > save.deadline:",
        "if False:",
        "train/test_saver.py::test_a_writer_that_outlives_a_kill_is_named_and_left",
    ),
    Measure(
        "a failed background save is made up for",
        "train/saver.py",
        "            self.must_save = True\n            self._note(",
        "            self._note(",
        "train/test_saver.py::test_a_save_in_the_background_that_fails_is_followed_by_a_blocking_one",
    ),
    Measure(
        "weights wait for their copy",
        "checkpoint/background.py",
        "        self._snapshot.wait()\n",
        "        pass\n",
        "train/test_saver.py::test_weights_change_only_after_their_copy",
    ),
    Measure(
        "a save waits for what is removed",
        "checkpoint/background.py",
        "        self.wait_for_pruning()  # staging",
        "        pass  # staging",
        "train/test_saver.py::test_the_next_save_begins_when_what_is_old_is_gone",
    ),
    # ---- which ones are kept ----
    Measure(
        "the last two are kept",
        "checkpoint/retention.py",
        "max(FEWEST_KEPT, retention.keep_last)",
        "retention.keep_last",
        f"{FOLDER}the_last_ones_are_kept_and_never_fewer_than_two",
    ),
    Measure(
        "damaged ones do not count",
        "checkpoint/retention.py",
        "sound += known.is_sound(found[position], note, closely=sound < FEWEST_KEPT)",
        "sound += 1",
        f"{FOLDER}unreadable_checkpoints_do_not_count_as_kept",
    ),
    Measure(
        "nothing is saved in a streak",
        "train/loop.py",
        "        if in_a_row and not last:",
        "        if False:",
        "train/test_health.py::test_a_step_that_is_not_finite_is_skipped_and_written_down",
    ),
    Measure(
        "nothing is removed in a streak",
        "train/loop.py",
        "        self.saver.keeps_all = in_a_row > 0\n",
        "",
        "train/test_health.py::test_a_run_that_ends_in_bad_steps_keeps_the_older_checkpoints",
    ),
    # ---- how a run goes on ----
    Measure(
        "an older one where loading finds damage",
        "train/begin.py",
        "if prepared.resume is None or not is_damage(error):",
        "if True:",
        f"{BEGIN}a_damaged_checkpoint_costs_its_steps_and_nothing_else",
    ),
    Measure(
        "an older one where looking finds damage",
        "checkpoint/folder.py",
        "                if not is_damage(error):\n                    raise",
        "                raise",
        f"{BEGIN}whatever_the_damage_the_one_before_is_taken",
    ),
    Measure(
        "live tensors against the digest",
        "checkpoint/live_state.py",
        'if f"{value:016x}" != expected:',
        "if False:",
        "checkpoint/test_digest.py::test_a_live_state_that_is_another_is_named",
    ),
    Measure(
        "live position against the digest",
        "checkpoint/live_state.py",
        "if state_digest(manifest.tensors, found, step, state) != saved.digest:",
        "if False:",
        "checkpoint/test_digest.py::test_a_live_state_that_is_another_is_named",
    ),
    Measure(
        "the state is compared before the first step",
        "train/loop.py",
        "        check_state(prepared, self.state, self.data, self.optimizer, ctx, sums, say)\n",
        "",
        f"{BEGIN}a_state_that_was_loaded_wrongly_trains_no_step",
    ),
    Measure(
        "the next step is what it was to be",
        "train/state.py",
        "if saved.get(name) != value and not may_differ[name]:",
        "if False:",
        f"{BEGIN}a_program_that_would_go_on_otherwise_is_refused",
    ),
    Measure(
        "traces without a checkpoint",
        "train/output.py",
        "if traces and FRESH not in accepted:",
        "if False:",
        f"{OUTPUT}a_run_that_never_had_a_checkpoint_begins_again",
    ),
    Measure(
        "left-overs go",
        "train/output.py",
        'return lines + clean_up(output / "checkpoints")',
        "return lines",
        f"{OUTPUT}what_kills_leave_goes_at_every_start",
    ),
    Measure(
        "metrics are cut back",
        "metrics/metrics_file.py",
        "found.content(up_to=last_step)",
        "found.content()",
        "train/test_run.py::test_metrics_are_cut_back_to_the_checkpoint",
    ),
    Measure(
        "place in the data",
        "train/loop.py",
        "self.batches.get(first, count",
        "self.batches.get(first - self.first_step + 1, count",
        "train/test_run.py::test_killed_and_resumed_is_bit_equal",
    ),
    Measure(
        "place of a shard",
        "checkpoint/read.py",
        "view = data[rows[0] - origin.rows[0] : rows[1] - origin.rows[0]]",
        "view = data[: rows[1] - rows[0]]",
        "checkpoint/test_layouts.py::test_every_layout_loads_from_every_layout",
    ),
    Measure(
        "gradients that ranks share are summed",
        "optim/store.py",
        'for over, group in (("tp", self.ctx.tp), ("kv", self.ctx.kv), ("stages", self.ctx.ends)):',
        'for over, group in (("kv", self.ctx.kv), ("stages", self.ctx.ends)):',
        "optim/test_sharded.py::test_it_trains_as_one_process",
    ),
    # ---- one writer ----
    Measure(
        "lock of the output",
        "train/output.py",
        "if not (_lock_folder(folder) and (taken := take_lock(lock, output / LOCK))):",
        "if False:",
        f"{OUTPUT}a_second_run_is_refused_even_where_the_lock_was_deleted",
    ),
    Measure(
        "an owner without flock looks once more",
        "base/locks.py",
        "if not present or present[-1][0] != number:",
        "if False:",
        "base/test_locks.py::test_who_looked_before_others_came_and_went_is_no_owner",
    ),
    Measure(
        "lock of the folder itself",
        "train/output.py",
        "_lock_folder(folder) and (taken",
        "(taken",
        f"{OUTPUT}a_second_run_is_refused_even_where_the_lock_was_deleted",
    ),
    Measure(
        "a lock is no link",
        "train/output.py",
        "os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC",
        "os.O_NONBLOCK | os.O_CLOEXEC",
        f"{OUTPUT}a_lock_that_is_something_else_is_refused_and_untouched",
    ),
    Measure(
        "the folder is still the same",
        "train/saver.py",
        "            if self._output is not None:\n                self._output.check()",
        "            pass",
        f"{OUTPUT}nothing_is_saved_into_a_folder_that_went_away",
    ),
    # ---- data ----
    Measure(
        "ids are of the vocabulary",
        "sampling/samples.py",
        "foreign = None if self.vocab_size is None else first_foreign_id(samples, self.vocab_size)",
        "foreign = None",
        "sampling/test_samples.py::test_an_id_beyond_the_vocabulary_is_named_with_its_document",
    ),
    Measure(
        "a file that was overwritten",
        "base/mapping.py",
        "        if now.st_size != before.st_size:",
        "        return\n        if now.st_size != before.st_size:",
        "base/test_mapping.py::test_a_changed_file_is_named",
    ),
    Measure(
        "a file that was cut",
        "base/mapping.py",
        "if self._watched is not None and _compiled.was_cut(self._watched):",
        "if False:",
        "base/test_mapping.py::test_a_cut_file_reads_as_zeros_and_says_so_for_ever",
    ),
    Measure(
        "the header is of these files",
        "dataset/reader.py",
        "if self.header is not None and self.header.fingerprint != fingerprint:",
        "if False:",
        "dataset/test_reader.py::test_header_of_other_files",
    ),
    Measure(
        "the built index is whole",
        "sampling/cache.py",
        'if xxhash.xxh3_128_hexdigest(content[start:].data) != tree["xxh3"]:',
        "if False:",
        "sampling/test_cache.py::test_a_damaged_or_foreign_file_is_built_anew",
    ),
    Measure(
        "only regular files are read",
        "base/reading.py",
        "    if not stat.S_ISREG(mode):",
        "    if False:",
        "base/test_reading.py::test_only_regular_files_are_opened",
    ),
    Measure(
        "JSON stays small",
        "base/reading.py",
        "    if values > most:",
        "    if False:",
        "base/test_reading.py::test_a_json_bomb_is_a_value_error",
    ),
    Measure(
        "strings of JSON stay short",
        "base/reading.py",
        "    if len(text) > PLAIN_JSON_BYTES + value_bytes * values:",
        "    if False:",
        "base/test_reading.py::test_long_strings_are_a_value_error",
    ),
    # ---- ranks ----
    Measure(
        "errors are everybody's",
        "parallel/agreement.py",
        "    if longest == 0:\n        return []",
        "    if longest >= 0:\n        return []",
        "parallel/test_agreement.py::test_all_raise_the_lowest_rank_s_error_or_none",
    ),
    Measure(
        "errors before the start",
        "parallel/agreement.py",
        '        if verdict["error"] is not None:',
        "        if False:",
        "parallel/test_agreement.py::test_one_error_before_the_start_is_raised_by_all",
    ),
    Measure(
        "facts are everybody's",
        "parallel/agreement.py",
        "        if mine.value != other.value:",
        "        if False:",
        "parallel/test_agreement.py::test_a_fact_that_differs_names_rank_and_file",
    ),
    Measure(
        "drift is an error",
        "train/drift.py",
        "        if not read_back(report.found, self.ctx.world):",
        "        if True:",
        "train/test_drift.py::test_a_run_that_drifts_ends_on_all_ranks_and_saves_nothing",
    ),
    Measure(
        "drift of the optimizer's state",
        "train/drift.py",
        "        if self.has_states:",
        "        if False:",
        "train/test_drift.py::test_copies_of_data_parallel_ranks",
    ),
    Measure(
        "drift before a save",
        "train/loop.py",
        "            self.drift.raise_on(self.drift.check(self.state.step), saving=True)",
        "            pass",
        "train/test_drift.py::test_a_run_that_drifts_ends_on_all_ranks_and_saves_nothing",
    ),
    Measure(
        "what is not finite changes nothing",
        "optim/optimizer.py",
        "            self.applied = self.finite = norm.isfinite()",
        "            self.finite = norm.isfinite()",
        "optim/test_optimizer.py::test_not_finite_changes_nothing_on_any_rank",
    ),
    Measure(
        "spikes",
        "train/health.py",
        "        elif limits is not None and (loss >",
        "        elif False and (loss >",
        "train/test_health.py::test_only_spikes_are_found_and_a_resume_decides_the_same",
    ),
    Measure(
        "limits of a phase are its own",
        "train/loop.py",
        "            self.health.begin_anew(step)",
        "            pass",
        "train/test_rewind.py::test_a_step_that_is_not_finite_over_the_end_of_a_phase",
    ),
    Measure(
        "what a window leaves out over phases",
        "train/rewind.py",
        "    unwanted = set(order.ids(start, end - start))",
        "    unwanted = set()",
        "train/test_rewind.py::test_what_is_left_out_over_phases_does_not_come_again",
    ),
    Measure(
        "silent corruption is an error",
        "train/corruption.py",
        "        if not read_back(report.found, self.ctx.world):",
        "        if True:",
        "train/test_corruption.py::test_a_run_ends_on_all_ranks_before_the_update_and_goes_on_from_a_good_checkpoint",
    ),
    Measure(
        "silent corruption updates nothing",
        "optim/optimizer.py",
        "        self.applied = self.applied & ~where",
        "        pass",
        "train/test_corruption.py::test_two_ranks_one_flip",
    ),
    Measure(
        "who hangs",
        "parallel/observe.py",
        "    return to_blame(ranks, alone) if late and not lively else []",
        "    return []",
        "parallel/test_observe.py::test_who_hangs",
    ),
    Measure(
        "who is healthy does not hang",
        "parallel/observe.py",
        "if late and not lively else []",
        "if late else []",
        "parallel/test_observe.py::test_who_hangs",
    ),
    Measure(
        "who died first",
        "supervise/watch.py",
        "when = -math.inf if number == signal.SIGKILL else rank.ended_at",
        "when = math.inf",
        "supervise/test_watch.py::test_the_one_that_died_is_named_for_every_signal_and_rank",
    ),
    Measure(
        "orphans are ended",
        "supervise/attempt.py",
        "*end_orphans(others_children | {r.pid for r in ranks if r.code is None})",
        "",
        "supervise/test_start.py::test_exit_code_and_one_line",
    ),
    Measure(
        "ranks die with the launcher",
        "base/system.py",
        "        C.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)\n",
        "        pass\n",
        "supervise/test_start.py::test_ranks_die_with_a_killed_launcher",
    ),
    Measure(
        "loopback only",
        "parallel/rendezvous.py",
        "        listener.bind(place)",
        '        listener.bind(("", place[1]))',
        "supervise/test_start.py::test_everything_listens_on_loopback_only",
    ),
    Measure(
        "ends of children are heard of",
        "base/cli.py",
        "    hear_of_children()\n",
        "",
        "base/test_cli.py::test_children_are_heard_of_although_sigchld_is_ignored",
    ),
    Measure(
        "a run that stood still does not hang",
        "parallel/observe.py",
        "        if self._has_slept():\n            return []\n",
        "",
        "parallel/test_observe.py::test_a_run_that_stood_still_as_a_whole_does_not_hang",
    ),
    Measure(
        "a stop signal while ranks start",
        "supervise/attempt.py",
        "            forward_signal(ranks, number)\n",
        "            pass\n",
        "supervise/test_start.py::test_a_signal_while_ranks_are_started_reaches_them",
    ),
    Measure(
        "a stop signal is heard",
        "train/loop.py",
        "            stopped |= words & MASK > 0\n",
        "",
        "train/test_run.py::test_sigterm_saves_and_exits_75",
    ),
)
