// 128-bit digests of texts, to find equal ones: two independent 64-bit hashes of the bytes. Not cryptographic: equal
// digests of different texts are a matter of chance (2^-128 a pair), which someone who chooses the texts can force.
//
// For lanes k = 0, 1 and 16 bytes at a time as two little-endian words lo, hi (the last zero-padded), modulo 2^64, with
// fold(x, y) the upper xor the lower half of the 128-bit product (wyhash's step):
//   h = S_k + length * 0x9E3779B97F4A7C15;   for each 16 bytes: h = fold(h ^ lo ^ A_k, (h + hi) ^ B_k) + lo
//   digest_k = fold(h ^ A_k, B_k ^ length)
// Digests are part of what an index on disk holds: they never change.
#pragma once

#include <cstdint>
#include <string_view>

namespace fastsft {

// digests [n, 2]; the same on every machine, whatever the number of threads.
void text_digests(const std::string_view* texts, int64_t n, uint64_t* digests);

}  // namespace fastsft
