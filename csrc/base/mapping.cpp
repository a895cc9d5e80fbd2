// A file that is cut while it is mapped: memory behind its new end raises SIGBUS, which would kill the process without
// a word. Here the signal is caught for ranges that were given to `watch`: the lost part of the range, from the page
// that was touched to the range's end, is replaced by pages of zeros, and the range is marked. The reader goes on and
// whoever uses what was read asks `was_cut` first (`megatron_hammer/base/mapping.py`). Nothing is added to a read
// itself, and it does not matter which code reads: NumPy, this library or another one.
//
// The same happens where a disk or a network file system fails to deliver a page. Any other SIGBUS goes to the handler
// that was there before. The handler only reads atomics and calls mmap, which on Linux is a plain system call.
#include <pybind11/pybind11.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <system_error>

namespace {

struct Range {
  std::atomic<uintptr_t> begin{0}, end{0};  // end 0: free
  std::atomic<bool> cut{false};
};

constexpr int64_t kInBlock = 1024;  // ranges allocated together; a dataset takes two
constexpr int64_t kBlocks = 1024;

struct Block {
  std::array<Range, kInBlock> ranges;
};

// The one list of a process, as its signal handler is one of a process. Blocks are never freed.
std::array<std::atomic<Block*>, kBlocks> blocks{};
std::atomic<int64_t> used{0};  // ranges that may be in use are below it
std::mutex changing;           // held by watch and unwatch, never by the handler
struct sigaction before;       // what else was to be done about SIGBUS; never our own handler
std::atomic<bool> passing{false};

Range& range_at(int64_t index) {
  return blocks[static_cast<size_t>(index / kInBlock)].load()->ranges[static_cast<size_t>(index % kInBlock)];
}

bool replace_lost_pages(uintptr_t address) {
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  for (int64_t i = 0; i < used.load(); ++i) {
    Range& range = range_at(i);
    const uintptr_t begin = range.begin.load(), end = range.end.load();
    if (address < begin || address >= end) continue;
    range.cut.store(true);
    const uintptr_t first = address / page * page;
    void* got = mmap(reinterpret_cast<void*>(first), end - first, PROT_READ,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    return got != MAP_FAILED;
  }
  return false;
}

void on_bus_error(int number, siginfo_t* info, void* context) {
  const int kept = errno;
  if (info->si_code > 0 && replace_lost_pages(reinterpret_cast<uintptr_t>(info->si_addr))) {
    errno = kept;
    return;
  }
  if (passing.exchange(true)) {  // whom it was passed on to has passed it back
    signal(number, SIG_DFL);
    raise(number);
  } else if ((before.sa_flags & SA_SIGINFO) != 0 && before.sa_sigaction != nullptr) {
    before.sa_sigaction(number, info, context);
  } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
    before.sa_handler(number);
  } else {
    sigaction(number, &before, nullptr);
    if (info->si_code <= 0) raise(number);  // sent by a process; a fault comes again by itself
  }
  errno = kept;
}

int64_t watch(uintptr_t address, uintptr_t size) {
  const std::lock_guard<std::mutex> lock(changing);
  struct sigaction now{};
  if (sigaction(SIGBUS, nullptr, &now) != 0) throw std::system_error(errno, std::generic_category());
  // Python's faulthandler, say, may have been enabled since the last file was mapped.
  if ((now.sa_flags & SA_SIGINFO) == 0 || now.sa_sigaction != on_bus_error) {
    struct sigaction action{};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    before = now;
    if (sigaction(SIGBUS, &action, nullptr) != 0) throw std::system_error(errno, std::generic_category());
  }
  int64_t index = 0;
  while (index < used.load() && range_at(index).end.load() != 0) ++index;
  if (index == kInBlock * kBlocks) throw std::runtime_error("too many mapped files");
  auto& block = blocks[static_cast<size_t>(index / kInBlock)];
  if (block.load() == nullptr) block.store(new Block);
  Range& range = range_at(index);
  range.cut.store(false);
  range.begin.store(address);
  range.end.store(address + size);
  if (index == used.load()) used.store(index + 1);
  return index;
}

void unwatch(int64_t index) {
  const std::lock_guard<std::mutex> lock(changing);
  range_at(index).end.store(0);
}

bool was_cut(int64_t index) { return range_at(index).cut.load(); }

}  // namespace

PYBIND11_MODULE(_mapping, module) {
  module.doc() = "Mapped files that may be cut while they are read; see csrc/base/mapping.cpp.";
  module.attr("INTERFACE") = 1;
  module.def("watch", &watch, pybind11::arg("address"), pybind11::arg("size"));
  module.def("unwatch", &unwatch, pybind11::arg("index"));
  module.def("was_cut", &was_cut, pybind11::arg("index"));
}
