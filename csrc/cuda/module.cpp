// Makes the library importable as megatron_nucleus._C_cuda; importing it registers the GPU operations. The schemas of
// those that a CPU has, too, are in megatron_nucleus._C; torch joins the two in either order.
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                                   nullptr};
  return PyModule_Create(&definition);
}
