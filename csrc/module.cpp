// Makes the library importable as megatron_nucleus._C; importing it registers torch.ops.megatron_nucleus.*.
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                                   nullptr};
  return PyModule_Create(&definition);
}
