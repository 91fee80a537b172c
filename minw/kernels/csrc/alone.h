// The team of a platform without threads: the caller runs all pieces of a loop itself.
//
// The interface is that of team.h, which says what it means.
#ifndef MINW_ALONE_H_
#define MINW_ALONE_H_

#include <cstddef>
#include <cstdint>

namespace minw {

class Team {
 public:
  static constexpr size_t kMaxPieces = (size_t{1} << 20) - 1;

  class Lease {
   public:
    explicit Lease(int) {}
    int threads() const { return 1; }

    template <class Piece>
    void loop(size_t count, const Piece& piece) const {
      for (size_t i = 0; i < count; i++) piece(i, 0);
    }
  };
};

}  // namespace minw

#endif  // MINW_ALONE_H_
