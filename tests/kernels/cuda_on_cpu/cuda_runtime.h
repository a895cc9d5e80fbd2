// A CPU in the place of CUDA's runtime and language, as far as csrc/kernels uses them: with this folder first among its
// include paths, a C++ compiler compiles the very kernel sources, and their launches run here, block after block.
//
// Every thread of a block is a fiber (ucontext) that runs until it meets a barrier: __syncthreads of its block, or a
// shuffle, which is one of its warp. A warp runs as far as it can while the others wait, warps and the threads in them in
// an order that is drawn anew each time from a fixed seed: a kernel that lacks a barrier sees values of its neighbours
// too early or too late. A barrier that some threads never reach is reported as a failed launch. Shared memory is static:
// blocks run one at a time.
//
// Not emulated: caches, memory order between blocks, the accuracy of the fast intrinsics (here they are exact).
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct float2 {
  float x, y;
};

enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;

inline std::string failure;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::ready;
  unsigned exchanges = 0;  // shuffles so far
};

struct Warp {
  uint64_t values[2][kWarp];  // of two shuffles in turn: one barrier each is enough
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline unsigned current;
inline const std::function<void()>* body;

inline void enter() {
  (*body)();
  fibers[current].state = State::done;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void begin(Fiber& fiber) {
  fiber.state = State::ready;
  fiber.exchanges = 0;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
}

inline void wait(State state) {
  const unsigned self = current;
  fibers[self].state = state;
  swapcontext(&fibers[self].context, &scheduler);
}

// Let threads [first, last) go on where all of them wait at this barrier.
inline bool release(unsigned first, unsigned last, State barrier) {
  for (unsigned i = first; i < last; ++i) {
    if (fibers[i].state != barrier) return false;
  }
  for (unsigned i = first; i < last; ++i) fibers[i].state = State::ready;
  return true;
}

// Let the threads of a warp run, in any order, until each has ended or waits for another warp.
inline void run_warp(unsigned first, unsigned last, std::mt19937& draw) {
  std::vector<unsigned> ready;
  do {
    ready.clear();
    for (unsigned i = first; i < last; ++i) {
      if (fibers[i].state == State::ready) ready.push_back(i);
    }
    for (size_t left = ready.size(); left > 0; --left) {
      std::swap(ready[draw() % left], ready[left - 1]);
      current = ready[left - 1];
      threadIdx.x = current;
      swapcontext(&scheduler, &fibers[current].context);
    }
  } while (release(first, last, State::at_warp_barrier));
}

// One block, whose threads all run `body`; false where they wait for each other.
inline bool run_block(unsigned threads, std::mt19937& draw) {
  for (unsigned i = 0; i < threads; ++i) begin(fibers[i]);
  std::vector<unsigned> order(threads / kWarp);
  std::iota(order.begin(), order.end(), 0);
  do {
    std::shuffle(order.begin(), order.end(), draw);
    for (unsigned warp : order) run_warp(warp * kWarp, (warp + 1) * kWarp, draw);
  } while (release(0, threads, State::at_block_barrier));
  return std::all_of(fibers.begin(), fibers.begin() + threads, [](const Fiber& f) { return f.state == State::done; });
}

inline cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const unsigned threads = config.blockDim.x;
  if (threads == 0 || threads > 1024 || threads % kWarp != 0 || config.gridDim.x == 0 || config.gridDim.y == 0 ||
      config.gridDim.y > 65535) {
    failure = "invalid launch configuration (the emulator wants whole warps)";
    return cudaErrorLaunchFailure;
  }
  if (fibers.size() < threads) fibers.resize(threads);
  if (warps.size() * kWarp < threads) warps.resize(threads / kWarp);
  std::mt19937 draw(threads);
  body = &kernel;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  for (unsigned y = 0; y < gridDim.y; ++y) {
    for (unsigned x = 0; x < gridDim.x; ++x) {
      blockIdx = dim3(x, y, 0);
      if (!run_block(threads, draw)) {
        failure = "threads of a block wait for each other at different barriers";
        return cudaErrorLaunchFailure;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace emulator

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  return emulator::launch(*config, [=] { kernel(static_cast<Parameters>(arguments)...); });
}

inline const char* cudaGetErrorString(cudaError_t) { return emulator::failure.c_str(); }

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;  // multiprocessor: loops over rows and vectors run more than once at small sizes
  return cudaSuccess;
}

inline void __syncthreads() { emulator::wait(emulator::State::at_block_barrier); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  using namespace emulator;
  const unsigned self = current;
  uint64_t* values = warps[self / kWarp].values[fibers[self].exchanges++ % 2];
  std::memcpy(&values[self % kWarp], &value, sizeof(T));
  wait(State::at_warp_barrier);
  std::memcpy(&value, &values[(self % kWarp) ^ mask], sizeof(T));
  return value;
}

inline unsigned atomicMax(unsigned* place, unsigned value) {
  const unsigned before = *place;
  if (value > before) *place = value;
  return before;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
