/* The C interface of packed networks: load a .minw file, classify images.
 *
 * Pixels are unsigned bytes, (batch, height, width, channels) in C order. All functions
 * except minw_free may be called on one network by many threads at once. No function
 * aborts or throws. Functions that can fail take a buffer of error_size bytes, into
 * which they write a message that ends with 0. Pass NULL and 0 if you do not want it.
 *
 * The environment variable MINW_ISA (portable, avx2, avx512, vbmi, amx, neon) forces an
 * instruction set. It is read when a network is loaded. Results do not depend on it.
 *
 * In WebAssembly, errors are thrown as a JavaScript Error instead of being returned.
 * The instance must not be used again (wasm.cc). There is no environment.
 */
#ifndef MINW_H_
#define MINW_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifdef __GNUC__
#define MINW_API __attribute__((visibility("default")))
#else
#define MINW_API
#endif

typedef struct minw_network minw_network;

enum minw_kind { MINW_INT = 0, MINW_CODE = 1, MINW_FLOAT = 2 };

/* The shape of a value. `bits` is 1 to 3 for MINW_CODE, else 0. */
typedef struct {
  uint32_t height, width, channels;
  uint32_t kind, bits;
} minw_shape;

/* Loads a network, or returns NULL. The bytes may be freed afterwards. The file is not
 * trusted: it is refused if it breaks a rule of the format, or if it costs more than
 * the default limits below. Only its metadata is not checked. */
MINW_API minw_network* minw_load(const void* bytes, size_t size, char* error,
                                 size_t error_size);
/* The most that loading and running a network may cost. docs/format.md says how it is
 * counted. UINT64_MAX stands for no limit. */
typedef struct {
  uint64_t padding;    /* Weights that padding adds, beyond 4 for each weight. */
  uint64_t memory;     /* Bytes of the values that an image needs at the same time. */
  uint64_t operations; /* Operations for an image. */
} minw_limits;

/* Loads a network within other limits than the default ones, which are 2^24, 2^29 and
 * 2^38. NULL stands for these. */
MINW_API minw_network* minw_load_within(const void* bytes, size_t size,
                                        const minw_limits* limits, char* error,
                                        size_t error_size);
MINW_API void minw_free(minw_network* network);

/* Shape of the images, before cropping. */
MINW_API minw_shape minw_source(const minw_network* network);
MINW_API uint32_t minw_classes(const minw_network* network);
/* The metadata: JSON in UTF-8 of `size` bytes, which belongs to the network. It is as
 * the file has it. Check it before you use it. */
MINW_API const char* minw_metadata(const minw_network* network, size_t* size);

/* Computes the logits, (batch, classes), on up to `threads` threads. Returns 0, or -1
 * for an error. */
MINW_API int minw_logits(const minw_network* network, const uint8_t* images,
                         size_t batch, float* logits, int threads, char* error,
                         size_t error_size);

/* Runs the images and measures the time of each operation. seconds[i], of minw_num_ops
 * elements, is the time of the pass that begins with operation i, summed over the
 * batch. It is 0 for operations in the pass of a convolution. Returns 0, or -1 for an
 * error. */
MINW_API int minw_profile(const minw_network* network, const uint8_t* images,
                          size_t batch, int threads, double* seconds, char* error,
                          size_t error_size);

/* The operations in their order. Names and kernels belong to the network. */
MINW_API uint32_t minw_num_ops(const minw_network* network);
MINW_API const char* minw_op_name(const minw_network* network, uint32_t op);
/* Describes the kernel that runs the operation, such as "W1A2 popcount": weights of 1
 * bit, activations of 2. */
MINW_API const char* minw_op_kernel(const minw_network* network, uint32_t op);

/* Value 0 is the cropped image less its offsets. Operation i makes value i + 1. */
MINW_API minw_shape minw_value_shape(const minw_network* network, uint32_t value);

/* Computes all values, without fusing operations. There are minw_num_ops + 1 pointers.
 * If values[i] is not NULL, it receives value i, (batch, height, width, channels):
 * pixels, sums and codes as int32, floats as float32. Returns 0, or -1 for an error. */
MINW_API int minw_values(const minw_network* network, const uint8_t* images,
                         size_t batch, void* const* values, char* error,
                         size_t error_size);

/* The network's instruction set, or for NULL the one that a network would get now. */
MINW_API const char* minw_isa(const minw_network* network);
/* Names of the instruction sets that run here, separated by spaces. */
MINW_API const char* minw_isas(void);

/* Runs steps of the kernel of an operation on registers alone, without loads and
 * stores. Its time shows the largest rate of the kernel. Returns how many products of
 * weights and activations were summed, or 0 if the kernel has no such measurement. */
MINW_API uint64_t minw_peak(const minw_network* network, uint32_t op, uint64_t steps);

/* The FNV-1a hash of 64 bits, by which the XLA handler MinwLogits knows a file. */
MINW_API uint64_t minw_hash(const void* bytes, size_t size);

#ifdef __cplusplus
}
#endif

#endif /* MINW_H_ */
