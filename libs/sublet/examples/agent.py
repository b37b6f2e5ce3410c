"""An agent: a loop of model calls and tools. One of the tools asks a human, who may need days to answer.

After a crash it continues with the step that is missing: no finished model call is paid for twice. How to run it
(README.md says more):

    sublet-worker agent:worker &
    python agent.py                      # starts the agent, and waits for its report
    python agent.py <question> evening   # answers the question that the worker prints, in another terminal
"""

import sys
from datetime import timedelta
from typing import Literal

from pydantic import BaseModel

from sublet import Context, DurableContext, SleepCondition, Sublet, TaskRunError, UserEventCondition, or_

sublet = Sublet()
MAX_STEPS = 20


class Text(BaseModel):
    text: str


class Step(Text):
    tool: Literal["ask_human", "book_flight", "done"]


@sublet.task(input_validator=Text, execution_timeout="5m", schedule_timeout="1d", retries=8, backoff_factor=2)
async def think(input: Text, ctx: Context) -> Step:
    """Your language model goes here. This stand-in reads the last line of its prompt only."""
    tool, _, said = input.text.splitlines()[-1].partition(": ")
    if tool == "ask_human":
        return Step(tool="book_flight", text=said.replace("no answer", "morning"))
    if tool == "book_flight" and not said.startswith("failed"):
        return Step(tool="done", text=said)
    return Step(tool="ask_human", text="Shall I book the morning flight or the evening flight?")


@sublet.task(input_validator=Text, schedule_timeout="1d")
async def book_flight(input: Text, ctx: Context) -> Text:
    if input.text not in ("morning", "evening"):
        raise LookupError(f"there is no {input.text} flight")
    return Text(text=f"The {input.text} flight is booked.")


@sublet.durable_task(input_validator=Text, schedule_timeout="1d")
async def ask_human(input: Text, ctx: DurableContext) -> Text:
    answer = UserEventCondition(
        "question.answered",
        "type(input.text) == string",  # other payloads are ignored
        scope=ctx.workflow_run_id,  # only answers to this question
        consider_events_since=await ctx.aio_now(),  # also an answer that arrives at once
    )
    # Your mail or chat goes here.
    await ctx.aio_memo(print, type(None), f"{input.text} Answer question {ctx.workflow_run_id}.")
    done = await ctx.aio_wait_for("answer", or_(answer, SleepCondition(timedelta(days=3))))
    return Text(text=done["CREATE"].get("question.answered", [{"text": "no answer"}])[0]["text"])


TOOLS = {"ask_human": ask_human, "book_flight": book_flight}


@sublet.durable_task(input_validator=Text)
async def agent(input: Text, ctx: DurableContext) -> Text:
    prompt = f"goal: {input.text}"
    for _ in range(MAX_STEPS):
        step = await think.aio_run(Text(text=prompt))
        if step.tool == "done":
            return Text(text=step.text)
        try:
            result = await TOOLS[step.tool].aio_run(Text(text=step.text))
            prompt += f"\n{step.tool}: {result.text}"
        except TaskRunError as error:  # the model sees it, and may try something else
            prompt += f"\n{step.tool}: failed: {error.exc}"
    raise RuntimeError(f"there is no result after {MAX_STEPS} steps")


worker = sublet.worker("agent", workflows=[agent, think, ask_human, book_flight])

if __name__ == "__main__":
    if sys.argv[1:]:
        sublet.event.push("question.answered", {"text": sys.argv[2]}, scope=sys.argv[1])
    else:
        print(agent.run(Text(text="Book a flight to Oslo on Friday.")).text)
