// B images, C channels, H x W positions; K x K taps. All tensors are fp32, channels last.
//
// The gradient of a depthwise convolution's weight on a CPU. The channels of a pixel lie side by side,
// so that one vector register holds a tap of 16 of them. A row of outputs is walked once for each row
// of taps, whose K sums stay in registers. Sums of a row are short, and are then added up by row, which
// loses fewer digits than one long sum.

#include <stdint.h>
#include <string.h>

typedef float float16 __attribute__((vector_size(64), aligned(4)));
typedef float float8 __attribute__((vector_size(32), aligned(4)));
typedef float float4 __attribute__((vector_size(16), aligned(4)));
typedef float float1 __attribute__((vector_size(4), aligned(4)));

typedef struct {
  int64_t channels, height, width, out_height, out_width, stride, padding;
} Shape;

// Adds to `sums` (K, K, C) what a row of outputs contributes, for the channels of one vector.
// `grad` (out_width, C), `image` (H, W, C); `top` is the row of the image below the first row of taps.
#define ADD_ROW(NAME, VECTOR, K)                                                                     \
  static inline void NAME(const float *grad, const float *image, float *sums, int64_t channel,       \
                          int64_t top, const Shape *s) {                                             \
    const int64_t C = s->channels;                                                                   \
    /* Outputs from `first` on and before `last` have all of their columns within the image. */      \
    int64_t first = (s->padding + s->stride - 1) / s->stride;                                        \
    int64_t last = s->width + s->padding < K ? 0 : (s->width - K + s->padding) / s->stride + 1;      \
    if (last > s->out_width) last = s->out_width;                                                    \
    if (first > last) first = last = s->out_width;                                                   \
    for (int64_t i = 0; i < K; i++) {                                                                \
      if (top + i < 0 || top + i >= s->height) continue;                                             \
      const float *row = image + (top + i) * s->width * C + channel;                                 \
      VECTOR tap[K];                                                                                 \
      for (int j = 0; j < K; j++) tap[j] = (VECTOR){0};                                              \
      for (int64_t o = first; o < last; o++) {                                                       \
        const VECTOR g = *(const VECTOR *)(grad + o * C + channel);                                  \
        const float *at = row + (o * s->stride - s->padding) * C;                                    \
        for (int j = 0; j < K; j++) tap[j] += g * *(const VECTOR *)(at + j * C);                     \
      }                                                                                              \
      for (int64_t o = first > 0 ? 0 : last; o < s->out_width; o = o + 1 == first ? last : o + 1) {  \
        const VECTOR g = *(const VECTOR *)(grad + o * C + channel);                                  \
        for (int j = 0; j < K; j++) {                                                                \
          const int64_t column = o * s->stride - s->padding + j;                                     \
          if (column >= 0 && column < s->width) tap[j] += g * *(const VECTOR *)(row + column * C);   \
        }                                                                                            \
      }                                                                                              \
      for (int j = 0; j < K; j++) *(VECTOR *)(sums + (i * K + j) * C + channel) += tap[j];           \
    }                                                                                                \
  }

#define ADD_ROW_OF_ALL_CHANNELS(K)                                                                   \
  ADD_ROW(add_row_16_##K, float16, K)                                                                \
  ADD_ROW(add_row_8_##K, float8, K)                                                                  \
  ADD_ROW(add_row_4_##K, float4, K)                                                                  \
  ADD_ROW(add_row_1_##K, float1, K)                                                                  \
  static void add_row_##K(const float *grad, const float *image, float *sums, int64_t top,           \
                          const Shape *s) {                                                          \
    int64_t c = 0;                                                                                   \
    for (; c + 16 <= s->channels; c += 16) add_row_16_##K(grad, image, sums, c, top, s);             \
    for (; c + 8 <= s->channels; c += 8) add_row_8_##K(grad, image, sums, c, top, s);                \
    for (; c + 4 <= s->channels; c += 4) add_row_4_##K(grad, image, sums, c, top, s);                \
    for (; c < s->channels; c++) add_row_1_##K(grad, image, sums, c, top, s);                        \
  }

ADD_ROW_OF_ALL_CHANNELS(3)
ADD_ROW_OF_ALL_CHANNELS(5)
ADD_ROW_OF_ALL_CHANNELS(9)
ADD_ROW_OF_ALL_CHANNELS(11)

// Sums (parts, K, K, C) of all rows of outputs, dealt out to `parts`. Which rows make a part depends on
// nothing but their number, so that the result is the same for any number of threads.
// `grad` (B, out_height, out_width, C), `x` (B, H, W, C). Returns 0, or 1 for a size that is not here.
int depthwise_weight_gradient(const float *grad, const float *x, float *sums, int64_t batch,
                              int64_t channels, int64_t height, int64_t width, int64_t out_height,
                              int64_t out_width, int64_t size, int64_t stride, int64_t parts,
                              int64_t threads) {
  const Shape s = {channels, height, width, out_height, out_width, stride, (size - 1) / 2};
  void (*add_row)(const float *, const float *, float *, int64_t, const Shape *) =
      size == 3 ? add_row_3 : size == 5 ? add_row_5 : size == 9 ? add_row_9 : size == 11 ? add_row_11 : 0;
  if (!add_row) return 1;
  const int64_t rows = batch * out_height, taps = size * size * channels;
  (void)threads;
#pragma omp parallel for schedule(static, 1) num_threads((int)threads)
  for (int64_t part = 0; part < parts; part++) {
    float *mine = sums + part * taps;
    memset(mine, 0, sizeof(float) * taps);
    for (int64_t row = part * rows / parts; row < (part + 1) * rows / parts; row++) {
      const int64_t image = row / out_height, top = row % out_height * stride - s.padding;
      add_row(grad + row * out_width * channels, x + image * height * width * channels, mine, top, &s);
    }
  }
  return 0;
}
