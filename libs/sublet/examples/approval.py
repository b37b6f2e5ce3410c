"""An approval with reminders: ask a person, remind them every day, ask their manager, and finally give up.

The run holds no worker slot while it waits for the answer. How to run it (README.md says more):

    sublet-worker approval:worker &
    python approval.py             # asks, and waits for the decision
    python approval.py <run> yes   # answers, in another terminal
"""

import sys
from datetime import timedelta
from typing import Literal

from pydantic import BaseModel

from sublet import Context, DurableContext, SleepCondition, Sublet, UserEventCondition, or_

sublet = Sublet()


class Purchase(BaseModel):
    item: str
    approver: str
    manager: str
    reminders: int = 2
    remind_every: timedelta = timedelta(days=1)


class Mail(BaseModel):
    to: str
    text: str


class Decision(BaseModel):
    outcome: Literal["approved", "rejected", "expired"]
    mails: int


@sublet.task(input_validator=Mail, retries=10, backoff_factor=2, schedule_timeout="1d")
async def send_mail(input: Mail, ctx: Context) -> None:
    ctx.log(f"To {input.to}: {input.text}")  # your mail server goes here


@sublet.durable_task(input_validator=Purchase)
async def approval(input: Purchase, ctx: DurableContext) -> Decision:
    answer = UserEventCondition(
        "approval.answered",
        "type(input.approved) == bool",  # other payloads are ignored
        scope=ctx.workflow_run_id,  # only answers to this run
        consider_events_since=await ctx.aio_now(),  # also an answer that arrives while a mail is being sent
    )
    recipients = [input.approver] * (1 + input.reminders) + [input.manager]
    for mails, recipient in enumerate(recipients, start=1):
        await send_mail.aio_run(Mail(to=recipient, text=f"{input.item}: yes or no? Run {ctx.workflow_run_id}"))
        done = await ctx.aio_wait_for("answer", or_(answer, SleepCondition(input.remind_every, "no answer yet")))
        if events := done["CREATE"].get("approval.answered"):
            return Decision(outcome="approved" if events[0]["approved"] else "rejected", mails=mails)
    return Decision(outcome="expired", mails=len(recipients))


worker = sublet.worker("approval", workflows=[approval, send_mail])

if __name__ == "__main__":
    if sys.argv[1:]:
        sublet.event.push("approval.answered", {"approved": sys.argv[2] == "yes"}, scope=sys.argv[1])
    else:
        purchase = Purchase(item="A boat", approver="ann@acme.example", manager="bo@acme.example")
        run = approval.run(purchase, wait_for_result=False)
        print(f"Answer with: python approval.py {run} yes", flush=True)
        print(run.result())
