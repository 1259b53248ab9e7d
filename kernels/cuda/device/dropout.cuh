// Dropout's random numbers. The mask is a function of where a token is in the data, so that
// forward, backward and recompute agree. One Philox call serves eight columns.
#ifndef PMLI_CUDA_DROPOUT_CUH
#define PMLI_CUDA_DROPOUT_CUH

struct Words {
    unsigned at[4];
};

// Philox 4x32-10, word for word as engine/src/base/philox.c. Salmon et al., SC 2011.
__device__ inline Words philox(unsigned long long seed, unsigned long long step, unsigned purpose,
                               unsigned long long index)
{
    unsigned key0 = (unsigned)seed, key1 = (unsigned)(seed >> 32);
    Words c = {{(unsigned)index, (unsigned)(index >> 32), (unsigned)step, purpose}};
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned high0 = __umulhi(0xD2511F53u, c.at[0]), low0 = 0xD2511F53u * c.at[0];
        const unsigned high1 = __umulhi(0xCD9E8D57u, c.at[2]), low1 = 0xCD9E8D57u * c.at[2];
        c = {{high1 ^ c.at[1] ^ key0, low1, high0 ^ c.at[3] ^ key1, low0}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

// Whether a word keeps the even or the odd one of its two elements: its low or its high half is no
// less than `least`, which stands in the high half.
__device__ inline bool keeps_even(unsigned word, unsigned least)
{
    return word << 16 >= least;
}

__device__ inline bool keeps_odd(unsigned word, unsigned least)
{
    return word >= least;
}

// Two neighbours of 16 bits, whatever they are, under their mask.
__device__ inline unsigned masked_two(unsigned two, unsigned word, unsigned least)
{
    two = keeps_even(word, least) ? two : two & 0xffff0000u;
    return keeps_odd(word, least) ? two : two & 0xffffu;
}

#endif
