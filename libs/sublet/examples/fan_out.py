"""Fan out and collect: import a file, one child task for each row, and report which rows failed.

The children run on all workers of the pool, each with its own retries. The parent holds no slot while it waits for
them. How to run it (README.md says more):

    sublet-worker fan_out:worker &
    python fan_out.py
"""

from pydantic import BaseModel

from sublet import Context, DurableContext, NonRetryableException, Sublet, TaskRunError

sublet = Sublet()


class File(BaseModel):
    rows: list[str]


class Row(BaseModel):
    text: str


class Stock(BaseModel):
    article: str
    quantity: int


class Report(BaseModel):
    imported: int
    pieces: int
    failed: list[str]


@sublet.task(input_validator=Row, retries=5, backoff_factor=2, schedule_timeout="1d")
async def import_row(input: Row, ctx: Context) -> Stock:
    article, _, quantity = input.text.partition(",")
    if not quantity.isdecimal():
        raise NonRetryableException(f"{quantity!r} is not a quantity")  # another attempt would fail again
    return Stock(article=article, quantity=int(quantity))  # your database goes here


@sublet.durable_task(input_validator=File)
async def import_file(input: File, ctx: DurableContext) -> Report:
    children = [import_row.create_bulk_run_item(Row(text=row)) for row in input.rows]
    results = await import_row.aio_run_many(children, return_exceptions=True)  # in the order of the rows
    imported = [result for result in results if isinstance(result, Stock)]
    failed = [f"row {n}: {error.exc}" for n, error in enumerate(results, start=1) if isinstance(error, TaskRunError)]
    return Report(imported=len(imported), pieces=sum(stock.quantity for stock in imported), failed=failed)


worker = sublet.worker("fan_out", slots=20, workflows=[import_file, import_row])

if __name__ == "__main__":
    print(import_file.run(File(rows=["bolt,1200", "nut,900", "washer,many", "screw,350"])))
