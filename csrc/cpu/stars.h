// Private to csrc/cpu: clusters of limited size. A star is a centre and sets that are similar to it. Sets are placed
// one after the other, in an order that their content gives: each joins the most similar star that has room, the
// earliest of equally similar ones, or else becomes the centre of a new one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastsft {

// Puts the sets, all different, into the order in which they are to be placed. print(set): its Fingerprint.
template <typename Set, typename Print>
void sort_for_stars(std::vector<Set>& sets, const Print& print) {
  std::sort(sets.begin(), sets.end(), [&](Set x, Set y) { return print(x) < print(y); });
}

// Sets are numbered in the order in which they are placed.
class Stars {
 public:
  class Choice {
   public:
    double similarity() const { return similarity_; }

    void offer(uint32_t centre, double similarity) {
      if (similarity < similarity_ || (similarity == similarity_ && centre > centre_)) return;
      similarity_ = similarity;
      centre_ = centre;
    }

   private:
    friend class Stars;
    double similarity_ = -1;
    uint32_t centre_ = 0;
  };

  Stars(std::size_t sets, int64_t limit) : limit_(limit), centre_(sets), size_(sets) {}

  // Whether the set is a centre whose star has room.
  bool open(uint32_t set) const { return size_[set] > 0 && size_[set] < limit_; }

  // Whether it became a centre.
  bool place(uint32_t set, const Choice& choice) {
    const uint32_t centre = choice.similarity_ < 0 ? set : choice.centre_;
    centre_[set] = centre;
    ++size_[centre];
    return centre == set;
  }

  uint32_t centre(uint32_t set) const { return centre_[set]; }

 private:
  int64_t limit_;
  std::vector<uint32_t> centre_;
  std::vector<int64_t> size_;  // of the centres' stars; 0 for other sets
};

}  // namespace fastsft
