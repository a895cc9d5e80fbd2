// The portable attention kernels against the formula in double: prints the largest error of the result and of each
// gradient, norm of the difference over the norm, in float and in bfloat16. Needs neither Python nor torch, so that it
// can be compiled for another processor and run in an emulator (test_cpu_attention_arm.py).
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "attention.hpp"

namespace {

using Numbers = std::vector<double>;

constexpr int64_t kRows = 75, kHeads = 4, kGroups = 2, kSize = 40;
const std::vector<int64_t> kBounds = {0, 1, 34, kRows};

Numbers random_numbers(int64_t count, uint64_t state) {
  Numbers numbers;
  for (int64_t i = 0; i < count; ++i) {
    double sum = -6;  // twelve uniform numbers: mean 0, variance 1
    for (int j = 0; j < 12; ++j) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      sum += static_cast<double>(state >> 11) / 9007199254740992.0;
    }
    numbers.push_back(sum);
  }
  return numbers;
}

void put(float* to, double x) { *to = static_cast<float>(x); }
void put(hammer::Bf16* to, double x) {
  const float rounded = static_cast<float>(x);
  uint32_t bits;
  memcpy(&bits, &rounded, sizeof bits);
  to->bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
double get(float x) { return x; }
double get(hammer::Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}

// Result and gradients of q, k, v by the formula; all are [rows, heads or groups, size].
void formula(const Numbers& q, const Numbers& k, const Numbers& v, const Numbers& grad, Numbers (&results)[4]) {
  const double scale = 1 / std::sqrt(static_cast<double>(kSize));
  for (size_t document = 0; document + 1 < kBounds.size(); ++document) {
    for (int64_t head = 0; head < kHeads; ++head) {
      for (int64_t i = kBounds[document]; i < kBounds[document + 1]; ++i) {
        const int64_t row = (i * kHeads + head) * kSize;
        const auto key = [&](int64_t j) { return (j * kGroups + head / (kHeads / kGroups)) * kSize; };
        Numbers p, dp;
        double sum = 0, delta = 0;
        for (int64_t j = kBounds[document]; j <= i; ++j) {
          double score = 0, product = 0;
          for (int64_t d = 0; d < kSize; ++d) {
            score += q[row + d] * k[key(j) + d];
            product += grad[row + d] * v[key(j) + d];
          }
          p.push_back(std::exp(score * scale));
          dp.push_back(product);
          sum += p.back();
        }
        for (size_t n = 0; n < p.size(); ++n) delta += (p[n] /= sum) * dp[n];
        for (size_t n = 0; n < p.size(); ++n) {
          const int64_t at = key(kBounds[document] + static_cast<int64_t>(n));
          const double ds = p[n] * (dp[n] - delta) * scale;
          for (int64_t d = 0; d < kSize; ++d) {
            results[0][row + d] += p[n] * v[at + d];
            results[1][row + d] += ds * k[at + d];
            results[2][at + d] += ds * q[row + d];
            results[3][at + d] += p[n] * grad[row + d];
          }
        }
      }
    }
  }
}

template <class T>
bool check(const char* name) {
  const int64_t of_q = kRows * kHeads * kSize, of_k = kRows * kGroups * kSize;
  const int64_t counts[8] = {of_q, of_k, of_k, of_q, of_q, of_q, of_k, of_k};  // q, k, v, grad; out and three gradients
  std::vector<T> tensors[8];
  Numbers inputs[4], truth[4];
  for (int i = 0; i < 8; ++i) {
    tensors[i].resize(static_cast<size_t>(counts[i]));
    if (i >= 4) {
      truth[i - 4].resize(static_cast<size_t>(counts[i]));
      continue;
    }
    inputs[i] = random_numbers(counts[i], static_cast<uint64_t>(i) + 1);
    for (int64_t n = 0; n < counts[i]; ++n) {
      put(&tensors[i][n], inputs[i][n]);
      inputs[i][n] = get(tensors[i][n]);
    }
  }
  std::vector<float> lse(kRows * kHeads);
  const auto strided = [&](int i) {
    const int64_t heads = counts[i] / kRows / kSize;
    return hammer::Strided{tensors[i].data(), heads * kSize, 0, kSize};
  };
  hammer::Attention call = {strided(0),
                            strided(1),
                            strided(2),
                            strided(4),
                            strided(3),
                            strided(5),
                            strided(6),
                            strided(7),
                            lse.data(),
                            kBounds.data(),
                            kBounds.data(),
                            static_cast<int64_t>(kBounds.size()) - 1,
                            1,
                            kHeads,
                            kGroups,
                            kSize,
                            static_cast<float>(1 / std::sqrt(static_cast<double>(kSize))),
                            sizeof(T) == 2,
                            1};
  if (!hammer::attention_forward(hammer::kAttentionPortable, call)) return false;
  if (!hammer::attention_backward(hammer::kAttentionPortable, call)) return false;
  formula(inputs[0], inputs[1], inputs[2], inputs[3], truth);
  printf("%s", name);
  for (int i = 0; i < 4; ++i) {
    double difference = 0, norm = 0;
    for (int64_t n = 0; n < counts[4 + i]; ++n) {
      difference += std::pow(get(tensors[4 + i][n]) - truth[i][n], 2);
      norm += truth[i][n] * truth[i][n];
    }
    printf(" %.3e", std::sqrt(difference / norm));
  }
  printf("\n");
  return true;
}

}  // namespace

int main() { return check<float>("float32") && check<hammer::Bf16>("bfloat16") ? 0 : 1; }
