// The kernels for what every machine of this architecture has (SSE2 on x86-64, NEON on aarch64).

#include "attention.hpp"
#include "kernels.hpp"

namespace {

bool runs_here() { return true; }

}  // namespace

#define HAMMER_VERSION portable
#define HAMMER_LANES 4
#include "attention.inl"
#include "kernels.inl"

namespace hammer {

constexpr Version kPortable = {"portable", runs_here, portable::table<float>(), portable::table<Bf16>(),
                               portable::square_sum};

constexpr AttentionVersion kAttentionPortable = {"portable", runs_here, portable::attention::passes<float>(),
                                                 portable::attention::passes<Bf16>()};

}  // namespace hammer
