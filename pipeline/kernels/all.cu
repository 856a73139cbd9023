// Every kernel, for one image: a family a file, each opening with its CPU definition, its launch and its time limit.

#include "attention.cu"
#include "attention_mma.cu"
#include "dropout.cu"
#include "elementwise.cu"
#include "head.cu"
#include "loss.cu"
#include "norm.cu"
#include "optimizer.cu"
#include "rope.cu"
#include "rows.cu"
#include "weights.cu"
