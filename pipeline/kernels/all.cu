#include "elementwise.cu"
