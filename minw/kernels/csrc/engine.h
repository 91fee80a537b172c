// The engine's own header: a loaded network, and the steps that load and run it.
//
// Loading takes five steps: parse.cc reads and checks the file, isa.cc lists the
// instruction sets of the CPU, choice.cc measures which one is fastest for a layer's
// bits, layer.cc lays out the weights of each convolution for its kernel, and plan.cc
// decides which operations share a pass and where values lie in memory. engine.cc calls
// these steps. run.cc runs a plan on the threads of a team (team.cc), and interface.cc
// is the C interface.
#ifndef MINW_ENGINE_H_
#define MINW_ENGINE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "minw.h"
#include "program.h"
#ifdef __wasm__
#include "alone.h"
#else
#include "team.h"
#endif

namespace minw {

// Alignment of buffers and of their parts, in bytes: the size of the longest vector.
constexpr size_t kAlign = 64;

// Sizes that a file asks for are uint64_t until memory is allocated, because their sums
// and products may exceed a size_t of 32 bits. A Buffer refuses those. What a kernel
// computes about memory that was allocated fits a size_t.
inline uint64_t aligned(uint64_t bytes) {
  return (bytes + kAlign - 1) / kAlign * kAlign;
}

// Bytes of a value of one image.
inline uint64_t map_bytes(const Map& m) {
  return uint64_t{1} * m.h * m.w * m.stride * m.size();
}

// Aligned memory of a fixed size.
class Buffer {
 public:
  // Throws std::bad_alloc if there is not as much memory.
  explicit Buffer(uint64_t bytes) : size_(bytes) {
    if (bytes > PTRDIFF_MAX) throw std::bad_alloc();
    data_ = static_cast<char*>(::operator new(bytes + 1, std::align_val_t(kAlign)));
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t(kAlign)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() const { return data_; }
  uint64_t size() const { return size_; }

 private:
  char* data_;
  uint64_t size_;
};

// Keeps scratch memory between calls, because fresh memory costs page faults. There is
// no lock that a thread could hold while another one forks: each buffer is owned either
// by one place or by one call. A fork's child loses the buffers that calls of other
// threads owned.
class Spare {
 public:
  ~Spare() {
    for (auto& place : places_) delete place.load();
  }

  // A buffer of at least `bytes` bytes.
  std::unique_ptr<Buffer> take(uint64_t bytes) {
    for (auto& place : places_)
      if (place.load(std::memory_order_relaxed)) {
        std::unique_ptr<Buffer> buffer(place.exchange(nullptr));
        if (buffer && buffer->size() >= bytes) return buffer;
      }
    return std::make_unique<Buffer>(bytes);
  }

  // Keeps a buffer for later calls, or frees it if all places are taken.
  void keep(std::unique_ptr<Buffer> buffer) {
    for (auto& place : places_) {
      Buffer* empty = nullptr;
      if (place.compare_exchange_strong(empty, buffer.get())) {
        // The place owns the buffer now.
        [[maybe_unused]] Buffer* owned = buffer.release();
        return;
      }
    }
  }

 private:
  static constexpr int kPlaces = 64;  // More threads than this are rare.
  std::atomic<Buffer*> places_[kPlaces] = {};
};

// ---- Instruction sets (isa.cc).

// An instruction set, and whether MINW_ISA names it.
struct IsaChoice {
  const Isa& isa;
  bool forced;
};

// The best instruction set that this CPU runs, or the one that MINW_ISA names. Throws
// Error if MINW_ISA names one that does not run here.
IsaChoice best_isa();

// Names of the instruction sets that this CPU runs, best first, separated by spaces.
const char* isa_names();

// ---- Layers (layer.cc).

// A convolution together with the memory that its plain struct points into.
struct Layer {
  Conv conv = {};
  std::unique_ptr<Buffer> weights;
  std::vector<int32_t> base;
  std::vector<int32_t> offsets, channels;
  std::vector<int> row_class, col_class;
  std::vector<Taps> taps;
  std::vector<char> border;
  const Isa* isa = nullptr;
  const char* kernel = "";
};

// Lays out the convolution of operation `op` for the kernels of `isa`. A convolution
// whose channels form groups may be split into several layers, one for each group.
std::vector<Layer> make_layers(const Program& program, int op, const Isa& isa);

// Packs the weights of a convolution for table lookups (pack.cc), as [number][channel]
// of each group.
//
// Args:
//   first: The convolution's first weight.
//   inputs: Input channels of an output channel.
//   digits: Input channels of a number.
void pack_numbers(const Conv& c, const Weights& weights, uint64_t first, int inputs,
                  int digits, char* to);

// Packs the weights for kTables, as [step][channel] of each group; see kernels_vbmi.cc.
void pack_indices(const Conv& c, const Weights& weights, uint64_t first, int inputs,
                  char* to);

// Packs the weights for kPairs, as [step][pair][vector][channel] of each group, in
// int16; see tiles.inc.
void pack_pairs(const Conv& c, const Weights& weights, uint64_t first, int inputs,
                char* to);

// Measures which instruction set is fastest for weights and activations of these bits:
// `best`, or one of those that may stand in for it (choice.cc). Activations of 0 bits
// are images. `pixels` are those of the layer's result.
const Isa* fastest_isa(const Isa* best, int w_bits, int a_bits, int pixels);

// ---- Plans (plan.cc).

// A pass: one operation, or a convolution and the operations after it.
struct Step {
  int op = -1;         // The last operation of the pass.
  int conv = -1;       // Operation of the convolution, or -1: none, or it is split.
  int threshold = -1;  // Operation of the thresholds, or -1.
  Finish finish = {};
};

// Bytes of scratch memory that the convolutions of a plan need besides the arena.
// Those of `image` grow with the number of images.
struct Needs {
  struct {
    uint64_t padded = 0, magnitudes = 0, part_in = 0, part_out = 0, acc = 0;
  } image;
  uint64_t padded = 0, acc = 0, lines = 0, gathered = 0, counts = 0;
};

// An order of steps, and the place of each value in memory. Values that do not live at
// the same time share memory, which is called the arena.
struct Plan {
  std::vector<Step> steps;
  std::vector<uint64_t> offset;  // Begin of each value in the arena, for one image.
  uint64_t arena = 0;            // Bytes of the arena for one image.
  size_t group = 1;              // Images that run through the steps together.
  Needs needs;
};

// Offsets at which the parts of scratch memory begin.
struct Places {
  uint64_t padded, magnitudes, part_in, part_out;
  uint64_t own, own_bytes;  // The first thread's part, and the size of each one.
  uint64_t pixels, base, sums, kind, order;  // Within a thread's part.
  uint64_t acc, lines, gathered, counts;
};

// The needs of one convolution whose pooling windows have `pool_h` rows.
Needs needs_of(const Conv& conv, int pool_h);

Places scratch_places(const Plan& plan, size_t images);

// The parts of scratch memory for a thread of a call with so many images.
Work work_in(char* scratch, const Places& places, int thread, size_t images);

}  // namespace minw

struct minw_network {
  minw_network(const uint8_t* bytes, size_t size, const minw::Limits& limits);

  size_t image_bytes() const {
    return static_cast<size_t>(program.source.h) * program.source.w * program.channels;
  }
  uint64_t scratch_bytes(const minw::Plan& plan, size_t images, int threads) const {
    minw::Places places = minw::scratch_places(plan, images);
    return places.own + places.own_bytes * threads;
  }

  // The instruction set for a convolution.
  const minw::Isa& layer_isa(const minw::Op& conv, const minw::Map& out) const;

  minw::Program program;
  minw::IsaChoice choice;
  // Layers of each operation: none for other operations than convolutions.
  std::vector<std::vector<minw::Layer>> layers;
  std::vector<minw::Threshold> thresholds;  // Used where the operation is a threshold.
  minw::Plan plain;  // One operation a step; all values stay in the arena.
  minw::Plan fast;   // Fused steps; values share memory.
  mutable minw::Spare spare;
};

namespace minw {

// Plans a network whose layers and thresholds are complete.
//
// Args:
//   fused: Whether max pooling and thresholds may join the pass of the convolution
//     before them, and values may share memory.
//   reach: Largest distance, in operations, between two operations of one pass.
Plan make_plan(const minw_network& net, bool fused, int reach);

// ---- Runs (run.cc).

// Runs a plan for n images, whose layers are divided among the threads of a team, in
// scratch memory of net.scratch_bytes(plan, n, team.threads()). If `seconds` is not
// null, the time of each step is added to the element of its first operation.
void run(const minw_network& net, const Plan& plan, const uint8_t* images, size_t n,
         char* scratch, float* logits, const Team::Lease& team,
         double* seconds = nullptr);

// Makes value 0 of n images: crops them and subtracts the offsets of their channels.
void store_images(const minw_network& net, const uint8_t* images, size_t n, char* out);

}  // namespace minw

#endif  // MINW_ENGINE_H_
