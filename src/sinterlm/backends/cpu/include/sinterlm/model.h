// All that an emitted translation unit needs: kernels, the native step, the C ABI's functions.
#pragma once
#include "sinterlm/attention.h"
#include "sinterlm/describe.h"
#include "sinterlm/kv.h"
#include "sinterlm/mlp.h"
#include "sinterlm/norm.h"
#include "sinterlm/probe.h"
#include "sinterlm/step.h"
