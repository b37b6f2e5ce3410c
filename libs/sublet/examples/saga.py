"""A saga: book a flight, a hotel and a car. If one of them fails, cancel what was booked, in reverse order.

A cancellation is tried again for days. If it fails for good, the run fails. How to run it (README.md says more):

    sublet-worker saga:worker &
    python saga.py Lisbon
    python saga.py Venice   # has no cars
"""

import sys
import uuid
from enum import StrEnum

from pydantic import BaseModel

from sublet import Context, DurableContext, NonRetryableException, Sublet, TaskRunError

sublet = Sublet()


class Service(StrEnum):
    FLIGHT = "flight"
    HOTEL = "hotel"
    CAR = "car"


class Trip(BaseModel):
    trip_id: str
    city: str


class Booking(Trip):
    service: Service


class Outcome(BaseModel):
    booked: list[Service] = []
    cancelled: list[Service] = []
    reason: str = ""


@sublet.task(input_validator=Booking, schedule_timeout="1h", retries=3, backoff_factor=2)
async def book(input: Booking, ctx: Context) -> None:
    """The provider's API goes here. A task can run twice, so send the trip's id as the idempotency key."""
    ctx.log(f"Book a {input.service} in {input.city}")
    if input.service is Service.CAR and input.city == "Venice":
        raise NonRetryableException("there are no cars in Venice")


@sublet.task(input_validator=Booking, schedule_timeout="7d", retries=100, backoff_factor=2, backoff_max_seconds=3600)
async def cancel(input: Booking, ctx: Context) -> None:
    """The provider's API goes here. A booking that does not exist counts as cancelled."""
    ctx.log(f"Cancel the {input.service} in {input.city}")


@sublet.durable_task(input_validator=Trip)
async def book_trip(input: Trip, ctx: DurableContext) -> Outcome:
    begun: list[Booking] = []
    try:
        for service in Service:
            # Noted before it is booked: a booking whose confirmation was lost must be cancelled, too.
            begun.append(Booking(trip_id=input.trip_id, city=input.city, service=service))
            await book.aio_run(begun[-1])
    except TaskRunError as error:
        begun.reverse()
        for booking in begun:
            await cancel.aio_run(booking)
        return Outcome(cancelled=[booking.service for booking in begun], reason=error.exc)
    return Outcome(booked=[booking.service for booking in begun])


worker = sublet.worker("saga", workflows=[book_trip, book, cancel])

if __name__ == "__main__":
    print(book_trip.run(Trip(trip_id=str(uuid.uuid4()), city=sys.argv[1])).model_dump_json())
