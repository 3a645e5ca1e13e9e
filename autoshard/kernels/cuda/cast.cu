// fp8 casts of bf16 matrices with one scale a tensor, for Ada and later. No header is needed, so that NVRTC alone can compile it.
//
// largest: the amax of a matrix, as the bits of a float in `amax`, which is 0 before. One reading, 16 bytes a thread and row.
// cast: q = round(x * scale) and, if `turned` is given, its transpose, from one reading. A block casts a tile of 128 x 128: a thread has 8
//   columns of 8 rows in registers, writes 8 bytes of q a row, and transposes its 8 x 8 bytes by byte permutations; through shared memory
//   the transpose leaves in runs of 128 bytes. Its pitch of 136 bytes, with a column's place permuted (j * 16 + lane), keeps the banks apart.
//   `scale` is given (`fixed`), or made of `amax`: top / amax, 1 where that means nothing. `inverse` gets 1 / scale, `seen` (may be null)
//   the amax of this tensor.
// shapes: x [r c] bf16, its rows `pitch` elements apart; q [r c], turned [c r]; r and c divide by 8, x and pitch by 16 bytes.

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(16) Eight {
    u32 part[4];
};

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ u32 magnitude(const Eight &v, u32 most) {
    // bf16 without its sign is ordered as an integer is; nan is above all
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 a = (v.part[i] & 0x7fffu) << 16, b = v.part[i] & 0x7fff0000u;
        most = max(most, max(a, b));
    }
    return most;
}

__device__ __forceinline__ u32 block_largest(u32 most) {
    __shared__ u32 of_warp[32];
    most = __reduce_max_sync(0xffffffffu, most);
    if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x >> 5] = most;
    __syncthreads();
    most = 0;
    if (threadIdx.x < 32) {
        most = threadIdx.x < (blockDim.x >> 5) ? of_warp[threadIdx.x] : 0;
        most = __reduce_max_sync(0xffffffffu, most);
    }
    return most;
}

extern "C" __global__ void __launch_bounds__(512) largest(const Eight *x, u32 *amax, long long rows, int width, long long pitch) {
    // width and pitch in pieces of 8 elements
    u32 most = 0;
    const long long pieces = rows * width, stride = (long long)gridDim.x * blockDim.x;
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (width == pitch) {
        for (; at + 3 * stride < pieces; at += 4 * stride) {
            Eight a = x[at], b = x[at + stride], c = x[at + 2 * stride], d = x[at + 3 * stride];
            most = magnitude(d, magnitude(c, magnitude(b, magnitude(a, most))));
        }
        for (; at < pieces; at += stride) most = magnitude(x[at], most);
    } else {
        for (; at < pieces; at += stride) most = magnitude(x[at / width * pitch + at % width], most);
    }
    most = block_largest(most);
    if (threadIdx.x == 0 && most) atomicMax(amax, most);
}

template <bool E4M3>
__device__ __forceinline__ u32 two(float first, float second) {
    unsigned short out;
    if (E4M3)
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(out) : "f"(second), "f"(first));
    else
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(out) : "f"(second), "f"(first));
    return out;
}

template <bool E4M3>
__device__ void cast_tile(const Eight *x, const float *fixed, const u32 *amax, u64 *q, u64 *turned, float *inverse, u32 *seen, int rows,
                          int columns, long long pitch) {
    __shared__ alignas(8) unsigned char tile[128 * 136];
    const int lane = threadIdx.x & 15, group = threadIdx.x >> 4;
    const int row = blockIdx.y * 128 + group * 8, column = blockIdx.x * 128 + lane * 8;
    const bool inside = row < rows && column < columns;
    Eight in[8];
    if (inside) {
#pragma unroll
        for (int i = 0; i < 8; i++) in[i] = x[(row + i) * pitch + column / 8];
    }
    float scale;
    if (fixed != nullptr) {
        scale = *fixed;
    } else {
        const float most = __uint_as_float(*amax);
        scale = (E4M3 ? 448.0f : 57344.0f) / most;
        if (!(most > 0.0f && scale <= 3.402823466e38f)) scale = 1.0f;
    }
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *inverse = 1.0f / scale;
    if (seen != nullptr) {
        u32 most = 0;
        if (inside) {
#pragma unroll
            for (int i = 0; i < 8; i++) most = magnitude(in[i], most);
        }
        most = block_largest(most);
        if (threadIdx.x == 0 && most) atomicMax(seen, most);
    }
    u32 left[8], right[8];  // of each row, its columns 0-3 and 4-7
    if (inside) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const u32 *p = in[i].part;
            left[i] = two<E4M3>(low(p[0]) * scale, high(p[0]) * scale) | two<E4M3>(low(p[1]) * scale, high(p[1]) * scale) << 16;
            right[i] = two<E4M3>(low(p[2]) * scale, high(p[2]) * scale) | two<E4M3>(low(p[3]) * scale, high(p[3]) * scale) << 16;
            q[((long long)(row + i) * columns + column) / 8] = (u64)right[i] << 32 | left[i];
        }
    }
    if (turned == nullptr) return;
    if (inside) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 *v = half ? right : left;
            u32 up[4], down[4];  // rows 0-3 and 4-7 of each of four columns
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const u32 *r = v + 4 * b;
                u32 a01 = __byte_perm(r[0], r[1], 0x5140), a23 = __byte_perm(r[2], r[3], 0x5140);  // columns 0, 1 of two rows, in turns
                u32 b01 = __byte_perm(r[0], r[1], 0x7362), b23 = __byte_perm(r[2], r[3], 0x7362);  // columns 2, 3
                u32 *out = b ? down : up;
                out[0] = __byte_perm(a01, a23, 0x5410);
                out[1] = __byte_perm(a01, a23, 0x7632);
                out[2] = __byte_perm(b01, b23, 0x5410);
                out[3] = __byte_perm(b01, b23, 0x7632);
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int place = (half * 4 + j) * 16 + lane;
                *(u64 *)(tile + place * 136 + group * 8) = (u64)down[j] << 32 | up[j];
            }
        }
    }
    __syncthreads();
    // 16 threads write the 128 rows of one column
    const int part = threadIdx.x & 15;
    const int first = blockIdx.y * 128 + part * 8;
    if (first >= rows) return;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int c = (threadIdx.x >> 4) + 16 * i;
        const int at = blockIdx.x * 128 + c;
        if (at < columns) turned[((long long)at * rows + first) / 8] = *(const u64 *)(tile + ((c & 7) * 16 + (c >> 3)) * 136 + part * 8);
    }
}

extern "C" __global__ void __launch_bounds__(256) cast_e4m3(const Eight *x, const float *fixed, const u32 *amax, u64 *q, u64 *turned,
                                                            float *inverse, u32 *seen, int rows, int columns, long long pitch) {
    cast_tile<true>(x, fixed, amax, q, turned, inverse, seen, rows, columns, pitch);
}

extern "C" __global__ void __launch_bounds__(256) cast_e5m2(const Eight *x, const float *fixed, const u32 *amax, u64 *q, u64 *turned,
                                                            float *inverse, u32 *seen, int rows, int columns, long long pitch) {
    cast_tile<false>(x, fixed, amax, q, turned, inverse, seen, rows, columns, pitch);
}
