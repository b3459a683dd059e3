// The functions of TensorFlow's C API that an operation needs, declared here so that no TensorFlow is needed to build, and looked up
// in the one that the process has loaded. They are stable: tensorflow/c/kernels.h, ops.h, tf_tensor.h, tf_status.h, tf_datatype.h.
#pragma once

#include <cstddef>
#include <cstdint>

struct TF_Status;
struct TF_Tensor;
struct TF_OpDefinitionBuilder;
struct TF_ShapeInferenceContext;
struct TF_ShapeHandle;
struct TF_KernelBuilder;
struct TF_OpKernelConstruction;
struct TF_OpKernelContext;

enum TF_DataType : int { TF_FLOAT = 1, TF_DOUBLE = 2, TF_UINT8 = 4, TF_BFLOAT16 = 14, TF_HALF = 19 };
enum TF_Code : int { TF_OK = 0, TF_INVALID_ARGUMENT = 3, TF_RESOURCE_EXHAUSTED = 8 };

using TF_ShapeFunction = void (*)(TF_ShapeInferenceContext*, TF_Status*);
using TF_Create = void* (*)(TF_OpKernelConstruction*);
using TF_Compute = void (*)(void*, TF_OpKernelContext*);
using TF_Delete = void (*)(void*);
using TF_Deallocate = void (*)(void* data, size_t bytes, void* argument);

#define EVENNORM_TENSORFLOW(X)                                                                                                      \
  X(TF_Status*, TF_NewStatus, ())                                                                                                   \
  X(void, TF_DeleteStatus, (TF_Status*))                                                                                            \
  X(void, TF_SetStatus, (TF_Status*, TF_Code, const char*))                                                                         \
  X(TF_Code, TF_GetCode, (const TF_Status*))                                                                                        \
  X(TF_Tensor*, TF_NewTensor, (TF_DataType, const int64_t* sizes, int rank, void* data, size_t bytes, TF_Deallocate, void*))        \
  X(void, TF_DeleteTensor, (TF_Tensor*))                                                                                            \
  X(TF_DataType, TF_TensorType, (const TF_Tensor*))                                                                                 \
  X(int, TF_NumDims, (const TF_Tensor*))                                                                                            \
  X(int64_t, TF_Dim, (const TF_Tensor*, int))                                                                                       \
  X(int64_t, TF_TensorElementCount, (const TF_Tensor*))                                                                             \
  X(void*, TF_TensorData, (const TF_Tensor*))                                                                                       \
  X(TF_OpDefinitionBuilder*, TF_NewOpDefinitionBuilder, (const char* name))                                                         \
  X(void, TF_OpDefinitionBuilderAddAttr, (TF_OpDefinitionBuilder*, const char*))                                                    \
  X(void, TF_OpDefinitionBuilderAddInput, (TF_OpDefinitionBuilder*, const char*))                                                   \
  X(void, TF_OpDefinitionBuilderAddOutput, (TF_OpDefinitionBuilder*, const char*))                                                  \
  X(void, TF_OpDefinitionBuilderSetShapeInferenceFunction, (TF_OpDefinitionBuilder*, TF_ShapeFunction))                             \
  X(void, TF_RegisterOpDefinition, (TF_OpDefinitionBuilder*, TF_Status*))                                                           \
  X(TF_ShapeHandle*, TF_NewShapeHandle, ())                                                                                         \
  X(void, TF_DeleteShapeHandle, (TF_ShapeHandle*))                                                                                  \
  X(void, TF_ShapeInferenceContextGetInput, (TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*))                          \
  X(void, TF_ShapeInferenceContextSetOutput, (TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*))                         \
  X(void, TF_ShapeInferenceContextSetUnknownShape, (TF_ShapeInferenceContext*, TF_Status*))                                         \
  X(void, TF_ShapeInferenceContextWithRank,                                                                                         \
    (TF_ShapeInferenceContext*, TF_ShapeHandle*, int64_t, TF_ShapeHandle* result, TF_Status*))                                      \
  X(void, TF_ShapeInferenceContextSubshape,                                                                                         \
    (TF_ShapeInferenceContext*, TF_ShapeHandle*, int64_t begin, int64_t end, TF_ShapeHandle* result, TF_Status*))                   \
  X(void, TF_ShapeInferenceContextConcatenateShapes,                                                                                \
    (TF_ShapeInferenceContext*, TF_ShapeHandle*, TF_ShapeHandle*, TF_ShapeHandle* result, TF_Status*))                              \
  X(TF_KernelBuilder*, TF_NewKernelBuilder, (const char* operation, const char* device, TF_Create, TF_Compute, TF_Delete))          \
  X(void, TF_KernelBuilder_TypeConstraint, (TF_KernelBuilder*, const char* attribute, TF_DataType, TF_Status*))                     \
  X(void, TF_RegisterKernelBuilder, (const char* name, TF_KernelBuilder*, TF_Status*))                                              \
  X(void, TF_OpKernelConstruction_GetAttrInt64, (TF_OpKernelConstruction*, const char* name, int64_t*, TF_Status*))                 \
  X(void, TF_OpKernelConstruction_GetAttrString, (TF_OpKernelConstruction*, const char* name, char*, size_t most, TF_Status*))      \
  X(void, TF_OpKernelConstruction_Failure, (TF_OpKernelConstruction*, TF_Status*))                                                  \
  X(void, TF_OpKernelContext_Failure, (TF_OpKernelContext*, TF_Status*))                                                            \
  X(void, TF_GetInput, (TF_OpKernelContext*, int, TF_Tensor**, TF_Status*))                                                         \
  X(void, TF_SetOutput, (TF_OpKernelContext*, int, const TF_Tensor*, TF_Status*))                                                   \
  X(TF_Tensor*, TF_AllocateOutput,                                                                                                  \
    (TF_OpKernelContext*, int, TF_DataType, const int64_t* sizes, int rank, size_t bytes, TF_Status*))

namespace evennorm {

#define EVENNORM_POINTER(Result, name, Arguments) inline Result(*name) Arguments = nullptr;
EVENNORM_TENSORFLOW(EVENNORM_POINTER)
#undef EVENNORM_POINTER

// False where this process has loaded no TensorFlow that has them all.
bool find_tensorflow();

}  // namespace evennorm
