/* The C interface of packed networks: load a .minw file, classify images.
 *
 * Pixels are unsigned bytes, (batch, height, width, channels) in C order. All functions
 * but minw_free may be called on one network by many threads at once. No function
 * aborts or throws: the ones that can fail take a buffer for a message (of error_size
 * bytes, ended with 0; NULL and 0 if it is not wanted).
 *
 * The environment variable MINW_ISA (portable, avx2, avx512, neon), read when a network
 * is loaded, forces an instruction set; results do not depend on it.
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

/* Of a value. Bits: 1 to 3 for MINW_CODE, else 0. */
typedef struct {
  uint32_t height, width, channels;
  uint32_t kind, bits;
} minw_shape;

/* A network, or NULL. The bytes may be freed afterwards. The file is not trusted: what
 * breaks a rule of the format, or costs more than the limits below, is refused. Only its
 * metadata are not read. */
MINW_API minw_network* minw_load(const void* bytes, size_t size, char* error,
                                 size_t error_size);
/* The most that loading and running a network may cost. docs/format.md says how it is
 * counted; UINT64_MAX is no limit.
 */
typedef struct {
  uint64_t padding;    /* Weights that padding adds, beyond 4 for each weight. */
  uint64_t memory;     /* Bytes of the values that an image needs at the same time. */
  uint64_t operations; /* Operations for an image. */
} minw_limits;

/* As minw_load, with other limits than 2^24, 2^29 and 2^38; these if NULL. */
MINW_API minw_network* minw_load_within(const void* bytes, size_t size,
                                        const minw_limits* limits, char* error,
                                        size_t error_size);
MINW_API void minw_free(minw_network* network);

/* Shape of the images, before cropping. */
MINW_API minw_shape minw_source(const minw_network* network);
MINW_API uint32_t minw_classes(const minw_network* network);
/* JSON, UTF-8, `size` bytes; belongs to the network. It is as the file has it: check it
 * before you use it. */
MINW_API const char* minw_metadata(const minw_network* network, size_t* size);

/* Fills logits, (batch, classes), on up to `threads` threads. 0, or -1 for an error. */
MINW_API int minw_logits(const minw_network* network, const uint8_t* images,
                         size_t batch, float* logits, int threads, char* error,
                         size_t error_size);

/* The operations in order; names and kernels belong to the network. */
MINW_API uint32_t minw_num_ops(const minw_network* network);
MINW_API const char* minw_op_name(const minw_network* network, uint32_t op);
/* What runs the operation, for people to read. */
MINW_API const char* minw_op_kernel(const minw_network* network, uint32_t op);

/* Value 0 is the cropped image less its offset, operation i makes value i + 1. */
MINW_API minw_shape minw_value_shape(const minw_network* network, uint32_t value);

/* All values, unfused: values[i], of minw_num_ops + 1, if not NULL, gets (batch,
 * height, width, channels) int32 pixels, sums or codes, or float32. 0, or -1 for an
 * error. */
MINW_API int minw_values(const minw_network* network, const uint8_t* images,
                         size_t batch, void* const* values, char* error,
                         size_t error_size);

/* The network's instruction set, or for NULL the one that would be taken. */
MINW_API const char* minw_isa(const minw_network* network);
/* Names of those that run here, separated by spaces. */
MINW_API const char* minw_isas(void);

/* For benchmarks: steps of the 1/1 kernel where nothing is loaded or stored; returns
 * how many products of one bit were summed. */
MINW_API uint64_t minw_peak(const minw_network* network, uint64_t steps);

/* FNV-1a of 64 bits: what names a file to the XLA handler MinwLogits. */
MINW_API uint64_t minw_hash(const void* bytes, size_t size);

#ifdef __cplusplus
}
#endif

#endif /* MINW_H_ */
