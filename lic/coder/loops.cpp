// Loops that would take a third of the time of a picture in Python: over latents that depend on the one before, and over
// pairs of pixels.
//
// lic_read_chain does what RangeDecoder.read and Decoder.pull_chain do, lic_states and lic_search what
// Dependent.quantisers and Dependent._search do, number for number, lic_means, lic_shrunken, lic_matched and
// lic_grouped what non_local_means._means, cosine_shrinkage._shrunken, block_matching._matched and groups._grouped do,
// up to rounding; these are what they are tested against. The caller has checked that every index is in range.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <vector>

namespace {

constexpr uint64_t QUARTER = 1u << 30, TOP = 1u << 31, REST = TOP - 1, MASK = 0xffffffffu;

int bit_length(uint64_t x) {
    int n = 0;
    while (x) {
        x >>= 1;
        ++n;
    }
    return n;
}

// Bits of `data` from `position` on, zeros behind its end.
uint64_t bits_at(const uint8_t* data, int64_t size, int64_t position, int count) {
    uint64_t value = 0;
    for (int64_t i = position; i < position + count; ++i) {
        const int64_t byte = i >> 3;
        value = value << 1 | (byte < size ? data[byte] >> (7 - (i & 7)) & 1u : 0u);
    }
    return value;
}

// The search goes from link to link with the totals of all states. A trellis says how: the place of a state among the
// totals, of which there are `size`; `words` of 32 choices for a link; link(), which makes the totals behind a link of
// those before, notes which of its two ways leads to each state, and returns the least total; and way(), which reads
// what was noted.

struct AnyTrellis {
    const int64_t *before, *branch;
    const int64_t states, size = states, words = (states + 31) / 32;

    int64_t place(int64_t s) const { return s; }

    int64_t way(const uint32_t* noted, int64_t s) const { return noted[s / 32] >> s % 32 & 1; }

    float link(const float* now, float* next, const float* cost, uint32_t* noted) const {
        float least = std::numeric_limits<float>::infinity();
        std::fill(noted, noted + words, 0);
        for (int64_t s = 0; s < states; ++s) {
            const float one = now[before[s]] + cost[branch[s]];
            const float other = now[before[states + s]] + cost[branch[states + s]];
            noted[s / 32] |= uint32_t(other < one) << s % 32;
            next[s] = other < one ? other : one;
            least = next[s] < least ? next[s] : least;
        }
        return least;
    }
};

typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif

Floats loaded(const float* at) {
    Floats result;
    std::memcpy(&result, at, sizeof result);
    return result;
}

template <int NUMBER>
void reordered(const float* row, float* target, int64_t size) {
    constexpr int LOW = NUMBER & 3;
    for (int64_t u = 0; u < size; u += 4) {
        const Floats its = loaded(row + (u ^ (NUMBER & 4)));
        const Floats result = SHUFFLED(its, its, 0 ^ LOW, 1 ^ LOW, 2 ^ LOW, 3 ^ LOW);
        std::memcpy(target + u, &result, sizeof result);
    }
}

// A trellis of many states is one of a shift register: each eight neighbouring states are led to by eight states 2*u + q
// with one q, u being eight in a row but for their order, in which the three lowest bits are exclusive-or'ed with some
// number. Totals lie in rows, u running fastest: of even states, of odd ones, and of these in such orders.
struct ShiftRegister {
    static constexpr int64_t WIDTH = 8, BLOCK = 128;  // states at a time, and those that four words tell the ways to
    const int64_t states, half = states / 2, words = states / 32;
    int64_t size = states;
    std::vector<int> orders;       // of each row from the third on, 8*q + number
    std::vector<int64_t> from[2];  // where the totals of each eight states before begin
    std::vector<int64_t> by[2];    // the branch from there

    explicit ShiftRegister(int64_t states) : states(states) {}

    // Whether the trellis is of this kind.
    bool takes(const int64_t* before, const int64_t* branch) {
        if (states % BLOCK) return false;
        for (int way = 0; way < 2; ++way)
            for (int64_t i = way * states; i < (way + 1) * states; i += WIDTH) {
                const int64_t u = before[i] >> 1, number = u % WIDTH, q = before[i] & 1;
                for (int64_t k = 0; k < WIDTH; ++k)
                    if (before[i + k] != 2 * (u ^ k) + q || branch[i + k] != branch[i]) return false;
                const auto order = std::find(orders.begin(), orders.end(), WIDTH * q + number);
                const int64_t row = number ? 2 + (order - orders.begin()) : q;
                if (number && order == orders.end()) orders.push_back(WIDTH * q + number);
                from[way].push_back(row * half + u - number);
                by[way].push_back(branch[i]);
            }
        size = (2 + orders.size()) * half;
        return true;
    }

    int64_t place(int64_t s) const { return (s & 1) * half + (s >> 1); }

    int64_t way(const uint32_t* noted, int64_t s) const {
        return noted[s / BLOCK * 4 + s % 4] >> (31 - s % BLOCK / 4) & 1;
    }

    float link(float* now, float* next, const float* cost, uint32_t* noted) const {
        constexpr void (*REORDERED[])(const float*, float*, int64_t) = {
            nullptr,      reordered<1>, reordered<2>, reordered<3>,
            reordered<4>, reordered<5>, reordered<6>, reordered<7>,
        };
        for (size_t i = 0; i < orders.size(); ++i)
            REORDERED[orders[i] % WIDTH](now + orders[i] / WIDTH * half, now + (2 + i) * half, half);
        Floats least = Floats{} + std::numeric_limits<float>::infinity();
        for (int64_t g = 0; g < states / WIDTH; noted += 4) {
            Words ways = {};
            for (const int64_t end = g + BLOCK / WIDTH; g < end; ++g) {
                const float *one = now + from[0][g], *other = now + from[1][g];
                const float of_one = cost[by[0][g]], of_other = cost[by[1][g]];
                Floats total[2];
                for (int k = 0; k < 2; ++k) {
                    const Floats a = loaded(one + 4 * k) + of_one, b = loaded(other + 4 * k) + of_other;
                    const Words is_other = (Words)(b < a);  // all bits 1 or 0
                    ways = ways + ways - is_other;
                    total[k] = is_other ? b : a;
                    least = total[k] < least ? total[k] : least;
                }
                const Floats even = SHUFFLED(total[0], total[1], 0, 2, 4, 6);
                const Floats odd = SHUFFLED(total[0], total[1], 1, 3, 5, 7);
                std::memcpy(next + g * WIDTH / 2, &even, sizeof even);
                std::memcpy(next + half + g * WIDTH / 2, &odd, sizeof odd);
            }
            std::memcpy(noted, &ways, sizeof ways);
        }
        return std::min(std::min(least[0], least[1]), std::min(least[2], least[3]));
    }
};

struct Parts {
    const int64_t *begins, *ends, *first, *last, count;
};

template <class Trellis>
void search(const Trellis& trellis, const float* costs, int64_t n, const Parts& parts, const int64_t* before,
            const int64_t* branch, int64_t* path, int64_t* passed) {
    const int64_t states = trellis.states, words = trellis.words;
    int64_t longest = 0;
    for (int64_t part = 0; part < parts.count; ++part)
        longest = std::max(longest, parts.ends[part] - parts.begins[part]);
    std::vector<float> now(trellis.size), next(trellis.size);
    std::vector<uint32_t> noted(longest * words);
    for (int64_t part = 0; part < parts.count; ++part) {
        const int64_t begin = parts.begins[part], end = parts.ends[part], first = parts.first[part];
        for (int64_t s = 0; s < states; ++s)
            now[trellis.place(s)] = first < 0 || first == s ? 0.0f : std::numeric_limits<float>::infinity();
        float least = 0.0f;  // taken away, so that single precision is enough
        for (int64_t i = begin; i < end; ++i) {
            float cost[4];
            for (int k = 0; k < 4; ++k) cost[k] = costs[k * n + i] - least;
            least = trellis.link(now.data(), next.data(), cost, noted.data() + (i - begin) * words);
            now.swap(next);
        }
        int64_t state = std::max(parts.last[part], int64_t(0));
        if (parts.last[part] < 0)
            for (int64_t s = 1; s < states; ++s)
                if (now[trellis.place(s)] < now[trellis.place(state)]) state = s;
        for (int64_t i = end - 1; i >= begin; --i) {
            const int64_t from = trellis.way(noted.data() + (i - begin) * words, state) * states + state;
            path[i] = branch[from];
            passed[i] = state = before[from];
        }
    }
}

// Pixels of a row are computed in vectors of eight where the processor has them, with the same results.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define WIDER __attribute__((target_clones("default", "avx2")))
#else
#define WIDER
#endif

#if defined(__GNUC__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE inline
#endif

// Non-local means, see lic_means.

// d: differences of n pixels of a row from others, in PLANES planes `stride` and d's rows n apart. sums: of each but the
// first and last one those of the squares of its own and of its two neighbours'.
template <int PLANES>
ALWAYS_INLINE void differences(const float* here, const float* there, int64_t stride, int64_t n, float* __restrict d,
                               float* __restrict squares, float* __restrict sums) {
    for (int64_t x = 0; x < n; ++x) {
        float square = 0;
        for (int k = 0; k < PLANES; ++k) {
            const float one = there[k * stride + x] - here[k * stride + x];
            d[k * n + x] = one;
            square += one * one;
        }
        squares[x] = square;
    }
    for (int64_t x = 1; x + 1 < n; ++x) sums[x] = squares[x - 1] + squares[x] + squares[x + 1];
}

// Weights of n pixels but for the first and last one.
ALWAYS_INLINE void weigh(const float* above, const float* at, const float* below, const float* calm,
                         const float* its_calm, float scale, const float* kernels, int64_t n, float* __restrict first,
                         float* __restrict second) {
    const float sharp = kernels[0], soft = kernels[1];
    for (int64_t x = 1; x + 1 < n; ++x) {
        const float distance = (above[x] + at[x] + below[x]) * scale * calm[x] * its_calm[x];
        const float a = 1 / (1 + distance * sharp), b = 1 / (1 + distance * soft);
        first[x] = a * a * (a * a);
        second[x] = b * b * (b * b);
    }
}

// Adds weights of n pixels to the first row of sums, and weights times differences, or less these, to the others.
template <int PLANES, bool LESS>
ALWAYS_INLINE void add(const float* weight, const float* d, int64_t d_stride, int64_t n, float* __restrict sums,
                       int64_t stride) {
    for (int64_t x = 0; x < n; ++x) {
        const float w = weight[x];
        sums[x] += w;
        for (int k = 0; k < PLANES; ++k) {
            const float change = w * d[k * d_stride + x];
            sums[(k + 1) * stride + x] += LESS ? -change : change;
        }
    }
}

constexpr int64_t TILE_ROWS = 64, TILE_COLUMNS = 128;  // so that sums stay in the cache

// Pixels in PLANES planes, which have `stride` in a row and `plane` in all, and `calm` of each; the first one of a tile of
// height x width pixels. There are as many pixels around it as an offset may reach, and one more.
struct Tile {
    const float *pixels, *calm, *kernels;
    int64_t stride, plane, height, width;
    float scale;
};

// Adds what pairs of pixels (down, right) apart are to each other, to sums (2, 1 + PLANES, TILE_ROWS, TILE_COLUMNS).
template <int PLANES>
ALWAYS_INLINE void add_pairs(const Tile& tile, int64_t down, int64_t right, float* sums, float* scratch) {
    constexpr int64_t ROW = TILE_COLUMNS, ALL = TILE_ROWS * ROW;
    // Pixels first..first + n - 1 of a row are compared; weights are known of all of them but the first and last one.
    const int64_t first = std::min<int64_t>(0, -right) - 1, n = tile.width + std::abs(right) + 2;
    float *d[3], *sum[3];
    for (int i = 0; i < 3; ++i) {
        d[i] = scratch + i * (PLANES + 1) * n;
        sum[i] = d[i] + PLANES * n;
    }
    float *squares = scratch + 3 * (PLANES + 1) * n, *weight[2] = {squares + n, squares + 2 * n};
    for (int64_t row = -down - 1; row <= tile.height; ++row) {
        const int64_t now = (row + down + 1) % 3, middle = row - 1, other = middle + down;
        const float* here = tile.pixels + row * tile.stride + first;
        differences<PLANES>(here, here + down * tile.stride + right, tile.plane, n, d[now], squares, sum[now]);
        if (middle < -down) continue;
        const float *above = sum[(now + 1) % 3], *at = sum[(now + 2) % 3], *below = sum[now];
        const float* calm = tile.calm + middle * tile.stride + first;
        const float* its_calm = calm + down * tile.stride + right;
        weigh(above, at, below, calm, its_calm, tile.scale, tile.kernels, n, weight[0], weight[1]);
        const float* found = d[(now + 2) % 3];
        for (int i = 0; i < 2; ++i) {
            float* of_kernel = sums + i * (PLANES + 1) * ALL;
            if (middle >= 0)
                add<PLANES, false>(weight[i] - first, found - first, n, tile.width, of_kernel + middle * ROW, ALL);
            if (other >= 0 && other < tile.height)
                add<PLANES, true>(weight[i] - first - right, found - first - right, n, tile.width,
                                  of_kernel + other * ROW, ALL);
        }
    }
}

WIDER void add_pairs_of_1(const Tile& tile, int64_t down, int64_t right, float* sums, float* scratch) {
    add_pairs<1>(tile, down, right, sums, scratch);
}

WIDER void add_pairs_of_3(const Tile& tile, int64_t down, int64_t right, float* sums, float* scratch) {
    add_pairs<3>(tile, down, right, sums, scratch);
}

// Shrunken cosine transforms, see lic_shrunken. Blocks begin at every second row and column; rows are split into even and
// odd columns, so that what blocks next to each other need lies next to each other, and eight blocks go together.
constexpr int64_t SIDE = 8, STRIDE = 2, BLOCKS = 64, KINDS = 2;  // BLOCKS: in a row of a strip; KINDS of thresholds
constexpr int64_t BEFORE = SIDE - STRIDE;                        // pixels of the first block before the strip
constexpr int64_t STRIP = STRIDE * (BLOCKS - SIDE / STRIDE + 1);  // columns that all their blocks are in

typedef float Eight __attribute__((vector_size(32)));

#if defined(__clang__)
#define SHUFFLED_EIGHT(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef uint32_t EightWords __attribute__((vector_size(32)));
#define SHUFFLED_EIGHT(a, b, ...) __builtin_shuffle(a, b, EightWords{__VA_ARGS__})
#endif

struct Cosines {
    float of[SIDE][SIDE];  // frequency, place

    Cosines() {
        for (int64_t u = 0; u < SIDE; ++u)
            for (int64_t i = 0; i < SIDE; ++i)
                of[u][i] = float(std::sqrt((u ? 2.0 : 1.0) / SIDE) * std::cos(std::acos(-1.0) * u * (2 * i + 1) / 16));
    }
};

// A cosine transform of eight, orthonormal: sums and differences of opposite places first, and for even frequencies of
// these once more.
ALWAYS_INLINE void to_frequencies(const Cosines& cosines, const Eight* in, Eight* out) {
    const auto& of = cosines.of;
    const Eight s0 = in[0] + in[7], s1 = in[1] + in[6], s2 = in[2] + in[5], s3 = in[3] + in[4];
    const Eight d0 = in[0] - in[7], d1 = in[1] - in[6], d2 = in[2] - in[5], d3 = in[3] - in[4];
    const Eight e0 = s0 + s3, e1 = s1 + s2, e2 = s0 - s3, e3 = s1 - s2;
    out[0] = of[0][0] * (e0 + e1);
    out[4] = of[0][0] * (e0 - e1);
    out[2] = of[2][0] * e2 + of[2][1] * e3;
    out[6] = of[2][1] * e2 - of[2][0] * e3;
    for (int64_t u = 1; u < SIDE; u += 2) out[u] = (of[u][0] * d0 + of[u][1] * d1) + (of[u][2] * d2 + of[u][3] * d3);
}

ALWAYS_INLINE void to_places(const Cosines& cosines, const Eight* in, Eight* out) {
    const auto& of = cosines.of;
    const Eight e0 = of[0][0] * (in[0] + in[4]), e1 = of[0][0] * (in[0] - in[4]);
    const Eight e2 = of[2][0] * in[2] + of[2][1] * in[6], e3 = of[2][1] * in[2] - of[2][0] * in[6];
    const Eight even[] = {e0 + e2, e1 + e3, e1 - e3, e0 - e2};
    for (int64_t i = 0; i < SIDE / 2; ++i) {
        const Eight odd = (of[1][i] * in[1] + of[3][i] * in[3]) + (of[5][i] * in[5] + of[7][i] * in[7]);
        out[i] = even[i] + odd;
        out[SIDE - 1 - i] = even[i] - odd;
    }
}

// What is kept between rows of a strip, of each frequency along them: the last SIDE rows, and what shrunken blocks have
// added to them and to the next ones.
struct Strip {
    float rows[SIDE][SIDE][BLOCKS];
    float sums[KINDS][SIDE][SIDE][BLOCKS];
};

// The row of pixels `row`, which begins BEFORE pixels before the strip, and has `there` columns; others are taken for 0.
WIDER void enter(const Cosines& cosines, const float* row, int64_t there, float (&frequencies)[SIDE][BLOCKS]) {
    float columns[STRIDE][BLOCKS + SIDE] = {};
    for (int64_t x = 0; x < std::min(there, STRIDE * BLOCKS + BEFORE); ++x) columns[x % STRIDE][x / STRIDE] = row[x];
    for (int64_t x = 0; x < BLOCKS; x += 8) {
        Eight in[SIDE], out[SIDE];
        for (int64_t i = 0; i < SIDE; ++i) std::memcpy(&in[i], &columns[i % STRIDE][x + i / STRIDE], sizeof in[i]);
        to_frequencies(cosines, in, out);
        for (int64_t u = 0; u < SIDE; ++u) std::memcpy(&frequencies[u][x], &out[u], sizeof out[u]);
    }
}

// Blocks whose first row is `first`.
WIDER void shrink(const Cosines& cosines, int64_t first, const float* thresholds, Strip& strip) {
    for (int64_t u = 0; u < SIDE; ++u)
        for (int64_t x = 0; x < BLOCKS; x += 8) {
            Eight in[SIDE], found[SIDE], shrunken[SIDE], out[SIDE];
            for (int64_t i = 0; i < SIDE; ++i) std::memcpy(&in[i], &strip.rows[(first + i) % SIDE][u][x], sizeof in[i]);
            to_frequencies(cosines, in, found);
            for (int64_t kind = 0; kind < KINDS; ++kind) {
                const float square = thresholds[kind] * thresholds[kind];
                for (int64_t v = 0; v < SIDE; ++v) {
                    const Eight power = found[v] * found[v];
                    shrunken[v] = u || v ? found[v] * (power / (power + square)) : found[v];
                }
                to_places(cosines, shrunken, out);
                for (int64_t i = 0; i < SIDE; ++i) {
                    float* sum = &strip.sums[kind][(first + i) % SIDE][u][x];
                    Eight before{};
                    if (i < BEFORE) std::memcpy(&before, sum, sizeof before);
                    before += out[i];
                    std::memcpy(sum, &before, sizeof before);
                }
            }
        }
}

// The first `width` pixels of a row that all its blocks have added to, less the row itself. It begins where the strip does.
WIDER void leave(const Cosines& cosines, const float (&sums)[SIDE][BLOCKS], const float* row, int64_t width, float* out) {
    float places[SIDE][BLOCKS];
    for (int64_t x = 0; x < BLOCKS; x += 8) {
        Eight in[SIDE], found[SIDE];
        for (int64_t u = 0; u < SIDE; ++u) std::memcpy(&in[u], &sums[u][x], sizeof in[u]);
        to_places(cosines, in, found);
        for (int64_t i = 0; i < SIDE; ++i) std::memcpy(&places[i][x], &found[i], sizeof found[i]);
    }
    constexpr float COUNT = (SIDE / STRIDE) * (SIDE / STRIDE);
    float columns[STRIDE][BLOCKS] = {};  // added up in the same order everywhere, so that a region is as in the whole
    for (int64_t i = 0; i < SIDE; ++i)
        for (int64_t x = BEFORE / STRIDE; x < BLOCKS; ++x) columns[i % STRIDE][x] += places[i][x - i / STRIDE];
    for (int64_t x = 0; x < width; ++x) out[x] = columns[x % STRIDE][(x + BEFORE) / STRIDE] / COUNT - row[x];
}

// Blocks that are most like others, for lic_matched and lic_grouped. Columns of the plane that blocks are compared in are
// split by what is left over from CELL, so that sums over cells of CELL x CELL pixels next to each other are sums of what
// lies next to each other. A block is four cells.
constexpr int64_t CELL = 4, RADIUS = 20, MOST_MATCHES = 16;
constexpr int64_t CELL_ROWS = TILE_ROWS / CELL + 2, CELL_COLUMNS = TILE_COLUMNS / CELL + 2;  // one more at each side
constexpr int64_t LANES = (CELL_COLUMNS + 7) / 8 * 8, SPLIT = LANES + 2 * RADIUS / CELL + 1;
constexpr int64_t SPLIT_ROWS = CELL * CELL_ROWS + 2 * RADIUS;
constexpr int64_t BLOCK_ROWS = CELL_ROWS - 1, BLOCK_COLUMNS = CELL_COLUMNS - 1;  // at most in a tile

// Offsets (down, right) of at most RADIUS, and how many matches to look for.
struct Offsets {
    const int64_t* each;
    const int64_t count, matches;
    const float scale;  // of distances, for weights
};

struct Matching {
    float split[SPLIT_ROWS][CELL][SPLIT];
    float cells[CELL_ROWS][LANES + 8];
    float worst[BLOCK_ROWS][LANES];                            // of the distances of each block, so far
    float distances[BLOCK_ROWS][BLOCK_COLUMNS][MOST_MATCHES];  // of each block, the least first
    int32_t away[BLOCK_ROWS][BLOCK_COLUMNS][MOST_MATCHES];     // in pixels
    float weights[BLOCK_ROWS][BLOCK_COLUMNS][MOST_MATCHES];    // (1 + scale * distance)^-4
};

// Sums of the squares of differences between what is `down` and `right` away and what is here, over `rows` rows of cells.
ALWAYS_INLINE void compare(Matching& matching, int64_t rows, int64_t down, int64_t right) {
    for (int64_t row = 0; row < rows; ++row) {
        Eight sums[LANES / 8] = {};
        for (int64_t i = 0; i < CELL; ++i)
            for (int64_t j = 0; j < CELL; ++j) {
                const int64_t its = j + RADIUS + right;
                const float* here = &matching.split[row * CELL + i + RADIUS][j][RADIUS / CELL];
                const float* there = &matching.split[row * CELL + i + RADIUS + down][its % CELL][its / CELL];
                for (int64_t x = 0; x < LANES / 8; ++x) {
                    Eight one, other;
                    std::memcpy(&one, here + 8 * x, sizeof one);
                    std::memcpy(&other, there + 8 * x, sizeof other);
                    other -= one;
                    sums[x] += other * other;
                }
            }
        std::memcpy(matching.cells[row], sums, sizeof sums);
    }
}

// Keeps of a block the `matches` least distances, of equal ones the first.
ALWAYS_INLINE void keep(float distance, int32_t away, int64_t matches, float* distances, int32_t* its) {
    int64_t at = matches - 1;
    for (; at > 0 && distance < distances[at - 1]; --at) {
        distances[at] = distances[at - 1];
        its[at] = its[at - 1];
    }
    distances[at] = distance;
    its[at] = away;
}

// Finds the matches of `rows` x `columns` blocks of a plane of `height` rows of `stride` pixels, the first of which begins
// at row `top` and column `left`.
WIDER void match(Matching& matching, const float* plane, int64_t height, int64_t stride, int64_t top, int64_t left,
                 int64_t rows, int64_t columns, const Offsets& offsets) {
    // What SPLIT takes in beyond the plane is in no block, and at no offset, that is asked for.
    for (int64_t row = 0; row < CELL * (rows + 1) + 2 * RADIUS; ++row) {
        const float* its = plane + std::min(std::max(top + row - RADIUS, int64_t(0)), height - 1) * stride;
        for (int64_t x = 0; x < CELL * SPLIT; ++x)
            matching.split[row][x % CELL][x / CELL] = its[std::min(std::max(left + x - RADIUS, int64_t(0)), stride - 1)];
    }
    constexpr float INFINITE = std::numeric_limits<float>::infinity();
    for (int64_t row = 0; row < rows; ++row) {
        for (auto& distances : matching.distances[row]) std::fill(distances, distances + offsets.matches, INFINITE);
        for (int64_t x = 0; x < LANES; ++x) matching.worst[row][x] = x < columns ? INFINITE : -INFINITE;
    }
    for (int64_t i = 0; i < offsets.count; ++i) {
        const int64_t down = offsets.each[2 * i], right = offsets.each[2 * i + 1];
        compare(matching, rows + 1, down, right);
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t x = 0; x < columns; x += 8) {
                const float *above = &matching.cells[row][x], *below = &matching.cells[row + 1][x];
                Eight one, two, three, four, worst;
                std::memcpy(&one, above, sizeof one);
                std::memcpy(&two, above + 1, sizeof two);
                std::memcpy(&three, below, sizeof three);
                std::memcpy(&four, below + 1, sizeof four);
                std::memcpy(&worst, &matching.worst[row][x], sizeof worst);
                const Eight distance = one + two + three + four;
                const auto better = distance < worst;
                uint64_t any[4];
                std::memcpy(any, &better, sizeof any);
                if (!(any[0] | any[1] | any[2] | any[3])) continue;
                for (int64_t lane = 0; lane < 8; ++lane)
                    if (better[lane]) {
                        float* distances = matching.distances[row][x + lane];
                        keep(distance[lane], int32_t(down * stride + right), offsets.matches, distances,
                             matching.away[row][x + lane]);
                        matching.worst[row][x + lane] = distances[offsets.matches - 1];
                    }
            }
    }
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t x = 0; x < columns; ++x)
            for (int64_t m = 0; m < offsets.matches; ++m) {
                const float a = 1 / (1 + offsets.scale * matching.distances[row][x][m]);
                matching.weights[row][x][m] = a * a * (a * a);
            }
}

// Adds to a row of CELL pixels of a plane what the matches of a block would change.
ALWAYS_INLINE void mend(const float* pixels, const float* weights, const int32_t* away, int64_t matches, Floats* sum) {
    const Floats own = loaded(pixels);
    for (int64_t m = 0; m < matches; ++m) *sum += weights[m] * (loaded(pixels + away[m]) - own);
}

// Groups of blocks, see lic_grouped.
constexpr int64_t MEMBERS = 16;

ALWAYS_INLINE void transpose(Eight (&rows)[SIDE]) {
    Eight pairs[SIDE], fours[SIDE];
    for (int64_t i = 0; i < 8; i += 2) {
        pairs[i] = SHUFFLED_EIGHT(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pairs[i + 1] = SHUFFLED_EIGHT(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int64_t i = 0; i < 8; i += 4)
        for (int64_t j = 0; j < 2; ++j) {
            fours[i + 2 * j] = SHUFFLED_EIGHT(pairs[i + j], pairs[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            fours[i + 2 * j + 1] = SHUFFLED_EIGHT(pairs[i + j], pairs[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int64_t i = 0; i < 4; ++i) {
        rows[i] = SHUFFLED_EIGHT(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        rows[i + 4] = SHUFFLED_EIGHT(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// A Haar transform of the members of a group, and its inverse.
template <bool BACK>
ALWAYS_INLINE void along_group(Eight (&group)[MEMBERS][SIDE]) {
    const float half = std::sqrt(0.5f);
    for (int64_t level = 1; level < MEMBERS; level *= 2) {
        const int64_t step = BACK ? MEMBERS / 2 / level : level;
        for (int64_t m = 0; m < MEMBERS; m += 2 * step)
            for (int64_t i = 0; i < SIDE; ++i) {
                const Eight one = group[m][i], other = group[m + step][i];
                group[m][i] = half * (one + other);
                group[m + step][i] = half * (one - other);
            }
    }
}

// What is added up of groups in each pixel: of each plane what is shrunken and what is averaged, and how much these count.
struct Sums {
    const int64_t planes, size;
    std::vector<float> all;

    Sums(int64_t planes, int64_t size) : planes(planes), size(size), all((2 * planes + 2) * size) {}

    float* shrunken(int64_t k) { return &all[2 * k * size]; }
    float* averaged(int64_t k) { return &all[(2 * k + 1) * size]; }
    float* count() { return &all[2 * planes * size]; }
    float* weight() { return &all[(2 * planes + 1) * size]; }
};

ALWAYS_INLINE void add_to(float* at, const Eight& its) {
    Eight sum;
    std::memcpy(&sum, at, sizeof sum);
    sum += its;
    std::memcpy(at, &sum, sizeof sum);
}

// Adds what a group of blocks of a plane, so many pixels away from `block`, are together: shrunken, and averaged.
WIDER void add_group(const Cosines& cosines, const float* block, const int32_t* away, const float* weights,
                     int64_t stride, float square, float* shrunken, float* averaged) {
    Eight group[MEMBERS][SIDE], part[SIDE], means[SIDE] = {};
    float total = 0;
    for (int64_t m = 0; m < MEMBERS; ++m) {
        for (int64_t i = 0; i < SIDE; ++i) {
            std::memcpy(&group[m][i], block + away[m] + i * stride, sizeof part[i]);
            means[i] += weights[m] * group[m][i];
        }
        total += weights[m];
        to_frequencies(cosines, group[m], part);
        transpose(part);
        to_frequencies(cosines, part, group[m]);
    }
    along_group<false>(group);
    const float mean = group[0][0][0];
    for (auto& coefficients : group)
        for (auto& its : coefficients) {
            const Eight power = its * its;
            its *= power / (power + square);
        }
    group[0][0][0] = mean;
    along_group<true>(group);
    for (auto& its : means) its /= total;
    for (int64_t m = 0; m < MEMBERS; ++m) {
        to_places(cosines, group[m], part);
        transpose(part);
        to_places(cosines, part, group[m]);
        for (int64_t i = 0; i < SIDE; ++i) {
            add_to(shrunken + away[m] + i * stride, group[m][i]);
            add_to(averaged + away[m] + i * stride, weights[m] * means[i]);
        }
    }
}

// Adds how much the members of a group count in the pixels that they take in.
WIDER void count_group(const int32_t* away, const float* weights, int64_t stride, float* count, float* weight) {
    for (int64_t m = 0; m < MEMBERS; ++m)
        for (int64_t i = 0; i < SIDE; ++i) {
            add_to(count + away[m] + i * stride, Eight{} + 1.0f);
            add_to(weight + away[m] + i * stride, Eight{} + weights[m]);
        }
}

}  // namespace

extern "C" {

// Reads up to n symbols of a chain whose first `start` are known. coder: low, high, distance of the code value from
// low, position of the next bit, bits used; state: of the chain. A row is that of `rows`, or the one behind it in an odd
// state. Stops at an escape, whose value and state the caller has to find. Without a trellis all rows are those of `rows`,
// and nothing stops it. Returns how many are read, -1 for a code value outside of a row, -2 behind the end.
int64_t lic_read_chain(const uint8_t* data, int64_t size, int64_t* coder, const int64_t* rows, int64_t start, int64_t n,
                       const uint16_t* cdfs, int64_t width, const int32_t* sizes, const int32_t* offsets,
                       const int64_t* trellis, int64_t* state, int64_t* used_rows, int64_t* symbols, int64_t* values) {
    uint64_t low = coder[0], high = coder[1], distance = coder[2];
    int64_t position = coder[3], used = coder[4], chain = *state, i = start;
    while (i < n) {
        const int64_t row = rows[i] + (trellis ? chain & 1 : 0);
        const uint16_t* cdf = cdfs + row * width;
        const int64_t count = sizes[row];
        const uint64_t span = high - low + 1, wanted = (((distance + 1) << 16) - 1) / span;
        int64_t symbol = 0;
        while (symbol < count && cdf[symbol + 1] <= wanted) ++symbol;
        if (symbol == count) return -1;
        high = low + (span * cdf[symbol + 1] >> 16) - 1;
        const uint64_t step = span * cdf[symbol] >> 16;
        low += step;
        distance -= step;
        int shift = 32 - bit_length(low ^ high);
        if (shift) {
            low = low << shift & MASK;
            high = (high << shift & MASK) | ((uint64_t(1) << shift) - 1);
        }
        if (low >= QUARTER && high < TOP + QUARTER) {
            const int extra = 31 - bit_length(~(low & ~high) & REST);
            low = low << extra & REST;
            high = (high << extra & REST) | TOP | ((uint64_t(1) << extra) - 1);
            shift += extra;
        }
        if (shift) {
            // At most 63 bits are shifted out, and the distance is less than the interval before and after.
            const int half = shift / 2;
            distance = distance << half | bits_at(data, size, position, half);
            distance = distance << (shift - half) | bits_at(data, size, position + half, shift - half);
            position += shift;
            used += shift;
            if (used > 8 * size) return -2;
        }
        used_rows[i] = row;
        symbols[i] = symbol;
        values[i] = symbol + offsets[row];
        ++i;
        if (!trellis) continue;
        if (symbol == count - 1) break;
        chain = trellis[2 * chain + (values[i - 1] & 1)];
    }
    coder[0] = low;
    coder[1] = high;
    coder[2] = distance;
    coder[3] = position;
    coder[4] = used;
    *state = chain;
    return i;
}

// The states before each of n symbols of a chain that begins in `state`; returns the one behind them.
int64_t lic_states(const int64_t* symbols, int64_t n, const int64_t* trellis, int64_t state, int64_t* states) {
    for (int64_t i = 0; i < n; ++i) {
        states[i] = state;
        state = trellis[2 * state + (symbols[i] & 1)];
    }
    return state;
}

// Paths of least cost through `count` parts of n latents. costs: (4, n), of the branches 2*quantiser + parity. before
// and branch: (2, states), the two ways into each state. Returns -1 if there is not enough memory.
int64_t lic_search(const float* costs, int64_t n, const int64_t* begins, const int64_t* ends, const int64_t* first,
                   const int64_t* last, int64_t count, const int64_t* before, const int64_t* branch, int64_t states,
                   int64_t* path, int64_t* passed) {
    const Parts parts{begins, ends, first, last, count};
    try {
        ShiftRegister many(states);
        if (many.takes(before, branch))
            search(many, costs, n, parts, before, branch, path, passed);
        else
            search(AnyTrellis{before, branch, states}, costs, n, parts, before, branch, path, passed);
    } catch (const std::exception&) {
        return -1;
    }
    return 0;
}

// Non-local means of `planes` planes, 1 or 3, of height x width pixels and `reach` more around, and of one such plane
// `calm`. Each of `count` offsets (down, right, group), in the order of their groups, is a pair of pixels that far apart,
// 0 <= down < reach and |right| < reach, which count for each other. With d their difference, and distance the sum of
// squares of d over all planes and 3x3 pixels, times scale and both pixels' calm, their weight is
// (1 + distance * kernel)^-4, for each of two kernels. means (groups, 2, planes, height, width) is the sum of weights
// times d over that of weights and `constant`. Of every `shares` tiles that with the number `share` is computed. Returns
// -1 if there is not enough memory.
int64_t lic_means(const float* pixels, const float* calm, int64_t planes, int64_t height, int64_t width, int64_t reach,
                  const int64_t* offsets, int64_t count, float scale, const float* kernels, float constant,
                  int64_t share, int64_t shares, float* means) {
    constexpr int64_t ALL = TILE_ROWS * TILE_COLUMNS;
    const int64_t stride = width + 2 * reach, plane = (height + 2 * reach) * stride;
    try {
        std::vector<float> scratch((3 * (planes + 1) + 3) * (TILE_COLUMNS + reach + 2));
        std::vector<float> sums(2 * (planes + 1) * ALL);
        int64_t number = 0;
        for (int64_t top = 0; top < height; top += TILE_ROWS)
            for (int64_t left = 0; left < width; left += TILE_COLUMNS) {
                if (number++ % shares != share) continue;
                const int64_t start = (top + reach) * stride + left + reach;
                const Tile tile{pixels + start, calm + start, kernels, stride, plane, std::min(TILE_ROWS, height - top),
                                std::min(TILE_COLUMNS, width - left), scale};
                for (int64_t i = 0; i < count;) {
                    const int64_t group = offsets[3 * i + 2];
                    std::fill(sums.begin(), sums.end(), 0.0f);
                    for (; i < count && offsets[3 * i + 2] == group; ++i)
                        (planes == 1 ? add_pairs_of_1 : add_pairs_of_3)(tile, offsets[3 * i], offsets[3 * i + 1],
                                                                        sums.data(), scratch.data());
                    for (int64_t kernel = 0; kernel < 2; ++kernel)
                        for (int64_t k = 0; k < planes; ++k)
                            for (int64_t row = 0; row < tile.height; ++row) {
                                const float* weight = sums.data() + kernel * (planes + 1) * ALL + row * TILE_COLUMNS;
                                const float* sum = weight + (k + 1) * ALL;
                                float* mean = means + (((group * 2 + kernel) * planes + k) * height + top + row) * width +
                                              left;
                                for (int64_t x = 0; x < tile.width; ++x) mean[x] = sum[x] / (weight[x] + constant);
                            }
                }
            }
    } catch (const std::exception&) {
        return -1;
    }
    return 0;
}

// Of `planes` planes of height x width pixels and `reach` (even, 8 or more) around, what shrinking cosine transforms adds
// to them: blocks of 8x8 pixels, at every second row and column, have all their coefficients c but the first one
// multiplied by c^2 / (c^2 + t^2), for each threshold t; a pixel is the mean of its 16 blocks. shrunken: (2, planes,
// height, width). Of every `shares` strips that with the number `share` is computed. Returns -1 if there is not enough
// memory.
int64_t lic_shrunken(const float* pixels, int64_t planes, int64_t height, int64_t width, int64_t reach,
                     const float* thresholds, int64_t share, int64_t shares, float* shrunken) {
    static const Cosines cosines;
    const int64_t stride = width + 2 * reach;
    try {
        std::vector<Strip> strip(1);
        int64_t number = 0;
        for (int64_t k = 0; k < planes; ++k)
            for (int64_t left = 0; left < width; left += STRIP) {
                if (number++ % shares != share) continue;
                const int64_t there = width - left + BEFORE + reach, wide = std::min(STRIP, width - left);
                const float* origin = pixels + (k * (height + 2 * reach) + reach) * stride + reach + left;
                // Rows are counted from the first one of the first block.
                for (int64_t row = 0; row - BEFORE < height + BEFORE + 1; ++row) {
                    enter(cosines, origin + (row - BEFORE) * stride - BEFORE, there, strip[0].rows[row % SIDE]);
                    const int64_t first = row - SIDE + 1;
                    if (first < 0 || first % STRIDE) continue;
                    shrink(cosines, first, thresholds, strip[0]);
                    for (int64_t y = first - BEFORE; y < first - BEFORE + STRIDE; ++y)
                        for (int64_t kind = 0; kind < KINDS && 0 <= y && y < height; ++kind)
                            leave(cosines, strip[0].sums[kind][(y + BEFORE) % SIDE], origin + y * stride, wide,
                                  shrunken + ((kind * planes + k) * height + y) * width + left);
                }
            }
    } catch (const std::exception&) {
        return -1;
    }
    return 0;
}

// Of `planes` planes of height x width pixels and `reach` (27 or more) around, what matched blocks add to them. Blocks
// of 8x8 pixels begin at every fourth row and column, counted from the first pixel inside. Of all that are an offset
// (down, right) of at most RADIUS away, `matches` have the least sum of squares of differences from a block in the
// first plane, of equal ones the first. They count for (1 + scale * that)^-4, beside `constant` for the block itself.
// A pixel is the mean of its four blocks. matched: (planes, height, width). Of every `shares` tiles that with the
// number `share` is computed. Returns -1 if there is not enough memory.
int64_t lic_matched(const float* pixels, int64_t planes, int64_t height, int64_t width, int64_t reach,
                    const int64_t* offsets, int64_t count, int64_t matches, float scale, float constant, int64_t share,
                    int64_t shares, float* matched) {
    const int64_t stride = width + 2 * reach, plane = (height + 2 * reach) * stride;
    try {
        std::vector<Matching> room(1);
        Matching& matching = room[0];
        int64_t number = 0;
        for (int64_t top = 0; top < height; top += TILE_ROWS)
            for (int64_t left = 0; left < width; left += TILE_COLUMNS) {
                if (number++ % shares != share) continue;
                const int64_t tall = std::min(TILE_ROWS, height - top), wide = std::min(TILE_COLUMNS, width - left);
                const int64_t rows = (tall + CELL - 1) / CELL + 1, columns = (wide + CELL - 1) / CELL + 1;
                match(matching, pixels, height + 2 * reach, stride, top - CELL + reach, left - CELL + reach, rows,
                      columns, Offsets{offsets, count, matches, scale});
                for (int64_t row = 0; row < rows; ++row)
                    for (int64_t x = 0; x < columns; ++x) {
                        float total = constant;
                        float* weights = matching.weights[row][x];
                        for (int64_t m = 0; m < matches; ++m) total += weights[m];
                        for (int64_t m = 0; m < matches; ++m) weights[m] /= total;
                    }
                for (int64_t k = 0; k < planes; ++k)
                    for (int64_t y = 0; y < tall; ++y)
                        for (int64_t x = 0; x < wide; x += CELL) {
                            const float* its = pixels + k * plane + (top + y + reach) * stride + left + x + reach;
                            Floats sum{};
                            for (int64_t i = 0; i < 2; ++i)
                                for (int64_t j = 0; j < 2; ++j)
                                    mend(its, matching.weights[y / CELL + i][x / CELL + j],
                                         matching.away[y / CELL + i][x / CELL + j], matches, &sum);
                            sum *= 0.25f;
                            std::memcpy(matched + (k * height + top + y) * width + left + x, &sum,
                                        std::min(CELL, wide - x) * sizeof(float));
                        }
            }
    } catch (const std::exception&) {
        return -1;
    }
    return 0;
}

// Of `planes` planes of height x width pixels and `reach` around, what groups of blocks add to them. Blocks of 8x8
// pixels begin at every fourth row and column, counted from the first pixel inside. Of all that are an offset (down,
// right) away, at most (reach - 7) / 2 and RADIUS, 15 or more, each has the 15 of least sum of squares of differences
// in the first plane, of equal ones the first, behind it in a group. First, of the cosine transforms of the members,
// transformed once more from member to member, all coefficients c but the first one are multiplied by c^2 / (c^2 +
// threshold^2); a pixel is the mean of all blocks of all groups that it is in. Second, all members become their mean,
// in which they count for (1 + scale * sum)^-4, as these means do in a pixel. grouped: (2, planes, height, width). Of
// `shares` parts of the rows that with the number `share` is computed. Returns -1 if there is not enough memory.
int64_t lic_grouped(const float* pixels, int64_t planes, int64_t height, int64_t width, int64_t reach,
                    const int64_t* offsets, int64_t count, float threshold, float scale, int64_t share, int64_t shares,
                    float* grouped) {
    static const Cosines cosines;
    const int64_t stride = width + 2 * reach, tall = height + 2 * reach, radius = (reach - SIDE + 1) / 2;
    const int64_t parts = (height + CELL - 1) / CELL;
    const int64_t first = parts * share / shares * CELL, last = std::min(parts * (share + 1) / shares * CELL, height);
    const int64_t before = (SIDE - 1 + radius) / CELL * CELL, behind = radius;  // where blocks begin, around pixels
    const int64_t across = (before + width - 1 + behind) / CELL + 1;
    if (first >= last) return 0;
    try {
        std::vector<Matching> room(1);
        Matching& matching = room[0];
        Sums sums(planes, (last - first + 2 * reach) * stride);  // which begin `reach` rows before the first
        std::vector<int32_t> groups(BLOCK_ROWS * across * MEMBERS);
        std::vector<float> weights(groups.size());
        for (int64_t top = first - before; top < last + behind; top += BLOCK_ROWS * CELL) {
            const int64_t rows = std::min(BLOCK_ROWS, (last + behind - top + CELL - 1) / CELL);
            for (int64_t number = 0; number < across; number += BLOCK_COLUMNS) {
                const int64_t columns = std::min(BLOCK_COLUMNS, across - number);
                match(matching, pixels, tall, stride, top + reach, number * CELL - before + reach, rows, columns,
                      Offsets{offsets, count, MEMBERS - 1, scale});
                for (int64_t row = 0; row < rows; ++row)
                    for (int64_t x = 0; x < columns; ++x) {
                        const int64_t at = (row * across + number + x) * MEMBERS;
                        groups[at] = 0;
                        weights[at] = 1;
                        std::copy(matching.away[row][x], matching.away[row][x] + MEMBERS - 1, &groups[at + 1]);
                        std::copy(matching.weights[row][x], matching.weights[row][x] + MEMBERS - 1, &weights[at + 1]);
                    }
            }
            // In the order of rows, whatever the parts, so that sums do not depend on these.
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t x = 0; x < across; ++x) {
                    const int32_t* group = &groups[(row * across + x) * MEMBERS];
                    const float* its_weights = &weights[(row * across + x) * MEMBERS];
                    const int64_t y = top + row * CELL, column = x * CELL - before + reach;
                    const int64_t at = (y - first + reach) * stride + column;
                    for (int64_t k = 0; k < planes; ++k)
                        add_group(cosines, pixels + (k * tall + y + reach) * stride + column, group, its_weights, stride,
                                  threshold * threshold, sums.shrunken(k) + at, sums.averaged(k) + at);
                    count_group(group, its_weights, stride, sums.count() + at, sums.weight() + at);
                }
        }
        for (int64_t k = 0; k < planes; ++k)
            for (int64_t y = first; y < last; ++y) {
                const float* own = pixels + (k * tall + y + reach) * stride + reach;
                const int64_t at = (y - first + reach) * stride + reach;
                float* shrunken = grouped + (k * height + y) * width;
                float* averaged = shrunken + planes * height * width;
                for (int64_t x = 0; x < width; ++x) {
                    shrunken[x] = sums.shrunken(k)[at + x] / sums.count()[at + x] - own[x];
                    averaged[x] = sums.averaged(k)[at + x] / sums.weight()[at + x] - own[x];
                }
            }
    } catch (const std::exception&) {
        return -1;
    }
    return 0;
}

}  // extern "C"
