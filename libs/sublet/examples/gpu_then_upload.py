"""GPU work, then an upload: while one task uploads, the next one uses the GPU.

The worker has one slot because it has one GPU. `aio_release_slot` frees the slot as soon as the GPU is free, and the
task continues. If the upload fails, the retry waits for a slot and renders again. How to run it (README.md says more):

    sublet-worker gpu_then_upload:worker &
    python gpu_then_upload.py
"""

import asyncio
from collections.abc import AsyncGenerator

from pydantic import BaseModel

from sublet import Context, Sublet

sublet = Sublet()


class Clip(BaseModel):
    name: str
    gpu_s: float = 0.5
    upload_s: float = 2


class Uploaded(BaseModel):
    url: str


class Gpu:
    """A stand-in for your model on the GPU, whose memory has room for one job."""

    def __init__(self) -> None:
        self._memory = asyncio.Lock()

    async def render(self, clip: Clip) -> bytes:
        if self._memory.locked():
            raise MemoryError("the GPU has no room for a second job")
        async with self._memory:
            await asyncio.sleep(clip.gpu_s)  # your model goes here; call blocking code by `asyncio.to_thread`
        return clip.name.encode()


async def load_model() -> AsyncGenerator[Gpu, None]:
    """Each worker loads the model once, when it starts."""
    yield Gpu()


@sublet.task(input_validator=Clip, execution_timeout="30m", schedule_timeout="1d", retries=3, backoff_factor=2)
async def render_clip(input: Clip, ctx: Context) -> Uploaded:
    gpu: Gpu = ctx.lifespan
    clip = await gpu.render(input)
    await ctx.aio_release_slot()
    await asyncio.sleep(input.upload_s)  # your object store goes here; a fixed name makes a second upload harmless
    return Uploaded(url=f"https://clips.example/{input.name}?bytes={len(clip)}")


worker = sublet.worker("gpu", slots=1, workflows=[render_clip], lifespan=load_model)

if __name__ == "__main__":
    clips = [Clip(name=f"clip-{number}") for number in range(4)]
    for uploaded in render_clip.run_many([render_clip.create_bulk_run_item(clip) for clip in clips]):
        print(uploaded.url)
