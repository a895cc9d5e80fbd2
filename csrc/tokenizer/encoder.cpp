#include "encoder.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <system_error>
#include <thread>

namespace hammer {
namespace {

constexpr size_t kTaskCharacters = size_t{1} << 18;  // parts of a long document
constexpr size_t kJobCharacters = size_t{1} << 15;   // short documents that a thread takes at once

uint32_t character_at(const Text& text, size_t i) {
  switch (text.width) {
    case 1: return static_cast<const uint8_t*>(text.data)[i];
    case 2: return static_cast<const uint16_t*>(text.data)[i];
    default: return static_cast<const uint32_t*>(text.data)[i];
  }
}

template <class Unit>
char* write_utf8(const Unit* begin, const Unit* end, char* out) {
  for (; begin < end; ++begin) {
    const uint32_t c = *begin;
    if (sizeof(Unit) > 1 && is_surrogate(c)) throw Surrogate();
    out += utf8_encode(c, out);
  }
  return out;
}

char* write_utf8(const Text& text, size_t begin, size_t end, char* out) {
  switch (text.width) {
    case 1: {
      const auto* data = static_cast<const uint8_t*>(text.data);
      if (!text.ascii) return write_utf8(data + begin, data + end, out);
      std::memcpy(out, data + begin, end - begin);
      return out + (end - begin);
    }
    case 2: {
      const auto* data = static_cast<const uint16_t*>(text.data);
      return write_utf8(data + begin, data + end, out);
    }
    default: {
      const auto* data = static_cast<const uint32_t*>(text.data);
      return write_utf8(data + begin, data + end, out);
    }
  }
}

// Makes ' ' of every U+2581, in place: from here on both mean the same. Returns the new end.
char* plain_spaces(char* begin, char* end) {
  static constexpr char kSpace[] = "\xE2\x96\x81";
  auto* from = static_cast<char*>(memmem(begin, static_cast<size_t>(end - begin), kSpace, 3));
  if (from == nullptr) return end;
  char* to = from;
  while (from < end) {
    if (end - from >= 3 && std::memcmp(from, kSpace, 3) == 0) {
      *to++ = ' ';
      from += 3;
    } else {
      *to++ = *from++;
    }
  }
  return to;
}

// Of several spaces leaves one, and none at the begin, in place: plain spaces only, as sentencepiece does.
char* single_spaces(char* begin, char* end) {
  char* to = begin;
  bool after_space = true;
  for (const char* from = begin; from < end; ++from) {
    if (*from != ' ' || !after_space) *to++ = *from;
    after_space = *from == ' ';
  }
  return to;
}

}  // namespace

size_t Encoded::total() const {
  size_t sum = 0;
  for (const Part& part : parts) sum += part.count;
  return sum;
}

void Encoded::gather(int32_t* out) const {
  for (const Part& part : parts) {
    if (part.count > 0) std::memcpy(out, buffers[part.buffer].data() + part.offset, part.count * sizeof(int32_t));
    out += part.count;
  }
}

Encoder::Encoder(const Model& model)
    : vocabulary_(model),
      add_dummy_prefix_(model.add_dummy_prefix),
      remove_extra_whitespaces_(model.remove_extra_whitespaces) {}

// The next place in a text where it can be cut whatever stands before: the two characters join in no piece, and no
// user-defined symbol holds the left one, so that none can lie across the cut nor begin at another place because of it.
size_t Encoder::safe_cut(const Text& text, size_t from) const {
  const auto look = [&](size_t i) {
    const uint32_t c = character_at(text, i);
    return vocabulary_.character(c == 0x2581 ? ' ' : c < 0x110000 ? c : 0);
  };
  for (size_t i = from; i < text.length; ++i) {
    const Vocabulary::Character left = look(i - 1);
    if (!left.inside_symbol && vocabulary_.adjacent(left.symbol, look(i).symbol) == Vocabulary::kApart) return i;
  }
  return text.length;
}

std::vector<Encoder::Task> Encoder::divide(const std::vector<Text>& texts) const {
  std::vector<Task> tasks;
  tasks.reserve(texts.size());
  for (size_t document = 0; document < texts.size(); ++document) {
    const Text& text = texts[document];
    size_t begin = 0;
    // Where spaces are removed, what a part begins with depends on the one before.
    while (!remove_extra_whitespaces_ && text.length - begin > 2 * kTaskCharacters) {
      const size_t cut = safe_cut(text, begin + kTaskCharacters);
      if (cut == text.length) break;
      tasks.push_back({document, begin, cut});
      begin = cut;
    }
    tasks.push_back({document, begin, text.length});
  }
  return tasks;
}

void Encoder::run(const Task& task, const Text& text, bool prefix, Worker& worker, std::vector<char>& scratch,
                  Ids& out) const {
  if (task.begin == task.end) return;
  if (text.ascii && !prefix && !remove_extra_whitespaces_) {
    const char* data = static_cast<const char*>(text.data);
    return worker.encode(data + task.begin, data + task.end, out);
  }
  const size_t most = text.ascii ? 1 : text.width + 1;  // bytes of UTF-8 that a character can need
  scratch.resize((task.end - task.begin) * most + 1);
  char* const start = scratch.data() + 1;
  char* begin = start;
  char* end = write_utf8(text, task.begin, task.end, begin);
  if (remove_extra_whitespaces_) end = single_spaces(begin, end);
  if (begin == end) return;
  end = plain_spaces(begin, end);
  if (prefix) *--begin = ' ';
  // The space in front goes, too, where nothing else is left.
  if (remove_extra_whitespaces_)
    while (begin < end && end[-1] == ' ') --end;
  worker.encode(begin, end, out);
}

Encoded Encoder::encode(const std::vector<Text>& texts, int threads, int32_t first, int32_t last, bool continued) {
  const std::vector<Task> tasks = divide(texts);
  std::vector<size_t> jobs{0};  // the first task of each, and the end
  for (size_t i = 0, characters = 0; i < tasks.size(); ++i) {
    characters += tasks[i].end - tasks[i].begin + 16;
    if (characters < kJobCharacters && i + 1 < tasks.size()) continue;
    jobs.push_back(i + 1);
    characters = 0;
  }
  const size_t count = jobs.size() - 1;
  const size_t workers = std::max<size_t>(1, std::min<size_t>(static_cast<size_t>(std::max(threads, 1)), count));
  Encoded encoded;
  encoded.lengths.resize(texts.size());
  encoded.parts.resize(count);
  encoded.buffers.resize(workers);
  std::vector<int64_t> lengths(tasks.size());
  std::vector<std::exception_ptr> errors(workers);
  std::atomic<size_t> next{0};
  const auto work = [&](size_t number) {
    try {
      std::unique_ptr<Worker> worker = borrow_worker();
      std::vector<char> scratch;
      Ids& out = encoded.buffers[number];
      for (size_t job; (job = next.fetch_add(1)) < count;) {
        const size_t offset = out.size();
        for (size_t i = jobs[job]; i < jobs[job + 1]; ++i) {
          const Task& task = tasks[i];
          const Text& text = texts[task.document];
          const size_t before = out.size();
          if (first >= 0 && task.begin == 0) out.push_back(first);
          const size_t opened = out.size();
          run(task, text, add_dummy_prefix_ && task.begin == 0 && !continued, *worker, scratch, out);
          if (out.size() == opened)
            out.resize(before);  // no ids: nothing goes around them
          else if (last >= 0 && task.end == text.length)
            out.push_back(last);
          lengths[i] = static_cast<int64_t>(out.size() - before);
        }
        encoded.parts[job] = {number, offset, out.size() - offset};
      }
      return_worker(std::move(worker));
    } catch (...) {
      errors[number] = std::current_exception();
      next = count;
    }
  };
  std::vector<std::thread> others;
  try {
    for (size_t number = 1; number < workers; ++number) others.emplace_back(work, number);
  } catch (const std::system_error&) {
    // The system grants no more threads: those that there are do the work.
  }
  work(0);
  for (std::thread& thread : others) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  for (size_t i = 0; i < tasks.size(); ++i) encoded.lengths[tasks[i].document] += lengths[i];
  return encoded;
}

std::unique_ptr<Worker> Encoder::borrow_worker() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (idle_.empty()) return std::make_unique<Worker>(vocabulary_);
  std::unique_ptr<Worker> worker = std::move(idle_.back());
  idle_.pop_back();
  return worker;
}

void Encoder::return_worker(std::unique_ptr<Worker> worker) {
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(worker));
}

}  // namespace hammer
