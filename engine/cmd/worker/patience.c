#include "patience.h"

double patience_with(double patience, int held, int devices)
{
    const double least = patience / 6;
    return least + (patience - least) * (devices - held) / devices;
}
