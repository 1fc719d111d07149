// Loops over latents that depend on the one before: in Python they would take a third of the time of a picture.
//
// lic_read_chain does what RangeDecoder.read and Decoder.pull_chain do, lic_states and lic_search what
// Dependent.quantisers and Dependent._search do, number for number; these are what they are tested against. The caller
// has checked that every index is in range.

#include <cstdint>
#include <limits>

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

// Paths of least cost through `parts` parts of n latents. costs: (4, n), of the branches 2*quantiser + parity. before and
// branch: (2, states), the two ways into each state. total: (2, states) and choices: (longest part, states) are room.
void lic_search(const float* costs, int64_t n, const int64_t* begins, const int64_t* ends, const int64_t* first,
                const int64_t* last, int64_t parts, const int64_t* before, const int64_t* branch, int64_t states,
                float* total, uint8_t* choices, int64_t* path, int64_t* passed) {
    for (int64_t part = 0; part < parts; ++part) {
        float *now = total, *next = total + states;
        for (int64_t s = 0; s < states; ++s)
            now[s] = first[part] < 0 || first[part] == s ? 0.0f : std::numeric_limits<float>::infinity();
        for (int64_t i = begins[part]; i < ends[part]; ++i) {
            const float cost[4] = {costs[i], costs[n + i], costs[2 * n + i], costs[3 * n + i]};
            uint8_t* choice = choices + (i - begins[part]) * states;
            float least = std::numeric_limits<float>::infinity();
            for (int64_t s = 0; s < states; ++s) {
                const float one = now[before[s]] + cost[branch[s]];
                const float other = now[before[states + s]] + cost[branch[states + s]];
                choice[s] = other < one;
                next[s] = other < one ? other : one;
                least = next[s] < least ? next[s] : least;
            }
            for (int64_t s = 0; s < states; ++s) next[s] -= least;  // so that single precision is enough
            float* swapped = now;
            now = next;
            next = swapped;
        }
        int64_t state = last[part];
        if (state < 0) {
            state = 0;
            for (int64_t s = 1; s < states; ++s)
                if (now[s] < now[state]) state = s;
        }
        for (int64_t i = ends[part] - 1; i >= begins[part]; --i) {
            const int64_t way = choices[(i - begins[part]) * states + state];
            path[i] = branch[way * states + state];
            state = before[way * states + state];
            passed[i] = state;
        }
    }
}

}  // extern "C"
