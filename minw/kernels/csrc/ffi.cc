// XLA's handler MinwLogits: (file, images) -> logits. One call runs the whole network.
#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>

#include "minw.h"
#include "xla/ffi/api/ffi.h"

extern "C" MINW_API XLA_FFI_Error* MinwLogits(XLA_FFI_CallFrame* frame);

namespace {

namespace ffi = xla::ffi;
using Network = std::shared_ptr<minw_network>;

// Networks by the hash of their file. The file is an operand of every call. Compiled
// code therefore holds no pointers, and a network that left the cache is read again.
class Cache {
 public:
  Network find(uint64_t hash, const uint8_t* bytes, size_t size, std::string* error) {
    Head head = {};
    std::memcpy(head.data(), bytes, std::min(size, head.size()));
    std::lock_guard<std::mutex> lock(mutex_);
    for (const Entry& entry : entries_)
      if (entry.hash == hash && entry.head == head) return entry.network;
    if (minw_hash(bytes, size) != hash) {
      *error = "the file is not the one that was traced";
      return nullptr;
    }
    char message[256] = "";
    // The file was loaded within limits when the call was traced.
    const minw_limits none = {UINT64_MAX, UINT64_MAX, UINT64_MAX};
    Network network(minw_load_within(bytes, size, &none, message, sizeof message),
                    minw_free);
    if (!network) {
      *error = message;
      return nullptr;
    }
    entries_.push_front({hash, head, network});
    if (entries_.size() > kMost) entries_.pop_back();
    return network;
  }

 private:
  using Head = std::array<uint8_t, 32>;  // Holds the file's checksum and size.
  struct Entry {
    uint64_t hash;
    Head head;
    Network network;
  };
  static constexpr size_t kMost = 16;  // Networks that are kept.
  std::mutex mutex_;
  std::deque<Entry> entries_;
};

ffi::Error run(ffi::Buffer<ffi::U8> file, ffi::Buffer<ffi::U8> images,
               ffi::ResultBuffer<ffi::F32> logits, int64_t hash, int32_t threads) {
  static Cache* cache = new Cache;  // Calls may outlive static objects.
  std::string error;
  Network network = cache->find(static_cast<uint64_t>(hash), file.typed_data(),
                                file.element_count(), &error);
  if (!network) return ffi::Error::InvalidArgument("packed network: " + error);
  minw_shape source = minw_source(network.get());
  uint32_t classes = minw_classes(network.get());
  size_t image = size_t{source.height} * source.width * source.channels;
  size_t batch = images.element_count() / image;
  auto shape = images.dimensions();
  size_t rank = shape.size();
  if (rank < 3 || shape[rank - 3] != source.height || shape[rank - 2] != source.width ||
      shape[rank - 1] != source.channels || logits->element_count() != batch * classes)
    return ffi::Error::InvalidArgument("images of another shape than the network's");
  char message[256] = "";
  if (minw_logits(network.get(), images.typed_data(), batch, logits->typed_data(),
                  threads, message, sizeof message))
    return ffi::Error::Internal(message);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MinwLogits, run,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("hash")
                                  .Attr<int32_t>("threads"));
