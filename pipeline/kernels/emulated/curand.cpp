// cuRAND as far as candle-core calls it. A generator is made with every device, but potstill draws no random numbers on one: those that
// would are refused.

#include "driver.h"

using namespace emulated;

namespace {

constexpr int SUCCESS = 0, INTERNAL_ERROR = 999;

int none() {
    return refuse(INTERNAL_ERROR, "random numbers are not emulated");
}

}  // namespace

API curandCreateGenerator(void** made, int) {
    static char generator;
    *made = &generator;
    return SUCCESS;
}
API curandDestroyGenerator(void*) { return SUCCESS; }
API curandSetPseudoRandomGeneratorSeed(void*, unsigned long long) { return SUCCESS; }
API curandSetGeneratorOffset(void*, unsigned long long) { return SUCCESS; }
API curandSetStream(void*, void*) { return SUCCESS; }
API curandGenerateUniform(void*, float*, unsigned long) { return none(); }
API curandGenerateUniformDouble(void*, double*, unsigned long) { return none(); }
API curandGenerateNormal(void*, float*, unsigned long, float, float) { return none(); }
API curandGenerateNormalDouble(void*, double*, unsigned long, double, double) { return none(); }
