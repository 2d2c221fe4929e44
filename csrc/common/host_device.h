// PF_HD marks the functions that both the host and the device compile.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define PF_HD __host__ __device__
#else
#define PF_HD
#endif
