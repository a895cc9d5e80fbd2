// Memory of large results, which come and go with every micro-batch: blocks in huge pages, which the process keeps.
//
// malloc's are not used, as torch uses them, for three reasons. Its pages are of 4 KiB unless the whole system or the
// process was told otherwise, and the operands of a product lie in hundreds of them: 2 % of a quick step in fp32 (Xeon
// with AVX-512, in a virtual machine). Asked for a block that begins at a multiple of 64 bytes glibc takes a hole that
// is larger by these, so the hole that a tensor leaves is a little too small for the next one of its size, and the heap
// grows: by 140 MB beside the 250 that a micro-batch keeps, at h 512, f 1408, 8 layers and 2,048 tokens in bf16
// (glibc 2.36). And what is freed goes back to the system, in part or, above 32 MiB, always: the next micro-batch pays
// for every page anew, 14 % of a step at that size in fp32.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <utility>

namespace hammer {

class Arena {
 public:
  // A block of `size` bytes that begins at a multiple of 64, a cache line and the widest vector, with any contents: of
  // the smallest hole that has room. Throws std::bad_alloc.
  void* take(size_t size) {
    size = taken(size);
#ifdef __SANITIZE_ADDRESS__
    if (void* const block = std::aligned_alloc(kLine, size)) return block;  // whose ends the sanitizer watches
    throw std::bad_alloc();
#endif
    const std::lock_guard<std::mutex> lock(mutex_);
    auto hole = by_size_.lower_bound({size, 0});
    if (hole == by_size_.end()) {
      grow(size);
      hole = by_size_.lower_bound({size, 0});
    }
    const auto [length, begin] = *hole;
    remove(begin, length);
    if (length > size) add(begin + size, length - size);
    return reinterpret_cast<void*>(begin);
  }

  // Takes back what `take` gave for this size.
  void give(void* data, size_t size) {
#ifdef __SANITIZE_ADDRESS__
    return std::free(data);
#endif
    const std::lock_guard<std::mutex> lock(mutex_);
    join(reinterpret_cast<uintptr_t>(data), taken(size));
  }

 private:
  static constexpr size_t kLine = 64, kHugePage = 2 << 20;

  static size_t rounded(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

  // Of a block of so many bytes, some lines more: tensors of a power of two would all begin in the same set of a cache.
  static size_t taken(size_t size) { return rounded(size, kLine) + 3 * kLine; }

  void add(uintptr_t begin, size_t length) {
    holes_[begin] = length;
    by_size_.insert({length, begin});
  }

  void remove(uintptr_t begin, size_t length) {
    holes_.erase(begin);
    by_size_.erase({length, begin});
  }

  // A new hole, one with those that it touches.
  void join(uintptr_t begin, size_t length) {
    auto next = holes_.lower_bound(begin);
    if (next != holes_.end() && next->first == begin + length) {
      const auto [other, more] = *next;
      remove(other, more);
      length += more;
      next = holes_.lower_bound(begin);
    }
    if (next != holes_.begin()) {
      const auto [other, less] = *--next;
      if (other + less == begin) {
        remove(other, less);
        begin = other;
        length += less;
      }
    }
    add(begin, length);
  }

  // Has the system give so much that a hole of this size comes to be: below what it gave last, so that all is one
  // range, where nothing else lies there.
  void grow(size_t size) {
    const auto edge = holes_.find(lowest_);
    const size_t missing = rounded(size - (edge == holes_.end() ? 0 : edge->second), kHugePage);
    uintptr_t begin = lowest_ > missing ? map(lowest_ - missing, missing) : 0;
    size_t length = missing;
    if (begin == 0 || begin + missing != lowest_) {
      if (begin != 0) munmap(reinterpret_cast<void*>(begin), missing);
      empty_holes();
      length = rounded(size, kHugePage);
      const uintptr_t somewhere = map(0, length + kHugePage);
      if (somewhere == 0) throw std::bad_alloc();
      begin = rounded(somewhere, kHugePage);  // of the page more that was asked for, what is not needed goes back
      if (begin > somewhere) munmap(reinterpret_cast<void*>(somewhere), begin - somewhere);
      if (somewhere + kHugePage > begin) munmap(reinterpret_cast<void*>(begin + length), somewhere + kHugePage - begin);
    }
#ifdef MADV_HUGEPAGE
    (void)madvise(reinterpret_cast<void*>(begin), length, MADV_HUGEPAGE);  // a hint: without them, pages are small
#endif
    lowest_ = begin;
    join(begin, length);
  }

  // Gives the system back what lies in holes, which stay: where a new range has to be elsewhere, results have grown,
  // and the holes of smaller ones may not be needed again.
  void empty_holes() {
    for (const auto& [begin, length] : holes_) {
      const uintptr_t first = rounded(begin, kHugePage), last = (begin + length) / kHugePage * kHugePage;
      if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
    }
  }

  // Where the system mapped so many bytes, near `hint` if it can; 0: nowhere.
  static uintptr_t map(uintptr_t hint, size_t length) {
    void* const data =
        mmap(reinterpret_cast<void*>(hint), length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return data == MAP_FAILED ? 0 : reinterpret_cast<uintptr_t>(data);
  }

  std::mutex mutex_;
  std::map<uintptr_t, size_t> holes_;  // where each begins -> its length
  std::set<std::pair<size_t, uintptr_t>> by_size_;  // the same, the smallest first
  uintptr_t lowest_ = 0;  // where the last part that the system gave begins
};

}  // namespace hammer
