"""A pretended Ascend machine: Huawei's own torch_npu wheel, unchanged, over a pretended CANN.

What runs is the real Python side of torch_npu, its allocator, its streams, generators and checks. What is pretended is
what lies below: the device's memory is the host's, its kernels are PyTorch's own for the CPU on the same bytes, and
HCCL is gloo. So it shows whether a program calls torch_npu rightly, keeps its tensors on one device and survives a
small one; it shows nothing of a card's numerics, speed, asynchronous races or graph mode.

    build.py     the wheel, compiled libraries and their cache; the environment of a process on it
    wheel.py     fetches torch_npu into a folder of its own
    compile.py   the compiler's part
    command.py   `crosstune doctor ascend-standin`
    cann/        CANN's C interface over host memory
    overlay/     kernels and HCCL, in C++
    inside/      Python that runs in the processes on the stand-in
"""
