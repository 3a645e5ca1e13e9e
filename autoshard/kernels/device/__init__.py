"""The kernels' Triton source, a file for each: imported when a kernel is first launched, so that nothing else needs Triton."""
