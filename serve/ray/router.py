"""PrefixRouter: chooses the replica for a request. Ray Serve runs it in each Front."""

from ray.serve._private.replica_result import ReplicaResult
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve.ray.prefix_index import PrefixIndex


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray's types are not read
    """Prefers the replica that has the prompt's prefix in its cache, unless that replica has too many requests.

    The first argument of a call must be the blocks of its prompt.
    """

    queue_len_response_deadline_s = 1.0  # a replica that computes on all cores may be slow to report its queue

    def initialize_state(self, max_blocks: int, margin: int) -> None:
        """Called by Ray with the deployment's request_router_kwargs; see PrefixIndex."""
        self._index = PrefixIndex(max_blocks=max_blocks, margin=margin)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Rank the candidates, one per rank. Ray takes the first that is not full."""
        by_name = {_name(replica.replica_id): replica for replica in candidate_replicas}
        lengths = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in by_name.items()}
        blocks = ()
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Ray retries without delay while all are full
            blocks = pending_request.args[0]
        return [[by_name[name]] for name in self._index.ranked(blocks, lengths)]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Called before a request is sent to a replica, which may still reject it."""
        super().on_send_request(replica_id)
        self._index.start(_name(replica_id))

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Called when a replica has accepted a request, which may have ended already."""
        del result
        self._index.add(_name(replica_id), pending_request.args[0])

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called when a request has ended for any reason."""
        del internal_request_id
        self._index.finish(_name(replica_id))

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._index.retain(set(map(_name, self.curr_replicas)))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._index.retain(set(map(_name, self.curr_replicas)))


def _name(replica: ReplicaID) -> str:
    return str(replica.unique_id)
