// What the tests of the emulated instructions share.
#pragma once

#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "emulator.h"

// Runs `body` in one block.
inline void run(int threads, std::size_t shared_bytes, const std::function<void()>& body) {
  cuda_host::launch("test", 1, static_cast<unsigned>(threads), shared_bytes, body);
}

// The text of the fault that `body` ends in, "" if it ends in none.
inline std::string fault(int threads, std::size_t shared_bytes, const std::function<void()>& body) {
  try {
    run(threads, shared_bytes, body);
  } catch (const cuda_host::Fault& error) {
    return error.what();
  }
  return "";
}

inline void expect(const std::string& text, const std::string& part) {
  const bool found = text.find(part) != std::string::npos;
  if (!found) std::printf("got: %s\nexpected: %s\n", text.c_str(), part.c_str());
  CHECK(found);
}

template <typename T>
std::vector<uint16_t> random_words(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> words(count);
  for (uint16_t& w : words) w = T::from_float(normal(random));
  return words;
}

// C [m, n] = A [m, k] B [n, k]^T, the elements' exact values summed in double.
template <typename T>
std::vector<double> product(const std::vector<uint16_t>& a, const std::vector<uint16_t>& b, int m, int n, int k) {
  std::vector<double> c(static_cast<std::size_t>(m) * n);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      for (int l = 0; l < k; ++l) c[i * n + j] += double{T::to_float(a[i * k + l])} * T::to_float(b[j * k + l]);
    }
  }
  return c;
}
