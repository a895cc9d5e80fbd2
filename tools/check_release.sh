#!/usr/bin/env bash
# Whether this tree may be tagged as a version, and what its release says: writes release-notes.md.
#
#   bash tools/check_release.sh 0.2.0
#
# The version must be the one of megatron_hammer/__init__.py and CITATION.cff, and the newest in CHANGELOG.md, with a
# date ("## 0.2.0 (2026-12-31)"). Exit code 2 where it is not.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
readonly version=${1:?the version, such as 0.2.0}

fail() {
    printf 'error[E260]: %s\n' "$1" >&2
    exit 2
}

grep -qx "__version__ = \"$version\"" megatron_hammer/__init__.py ||
    fail "megatron_hammer/__init__.py is not of version $version; set __version__"
grep -qx "version: $version" CITATION.cff || fail "CITATION.cff is not of version $version; set version"
newest=$(grep -m 1 '^## ' CHANGELOG.md)
[[ $newest =~ ^"## $version ("[0-9]{4}-[0-9]{2}-[0-9]{2}")"$ ]] ||
    fail "CHANGELOG.md begins with \"$newest\"; its newest heading must be \"## $version (YYYY-MM-DD)\""
awk '/^## /{n++} n==1 && !/^## /' CHANGELOG.md >release-notes.md
echo "version $version may be tagged: git tag -a v$version -F release-notes.md"
