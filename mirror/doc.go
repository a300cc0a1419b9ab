// Package mirror copies a disk to another one while clients read and write it, and moves
// the clients to the copy when both are equal.
//
// The two ends are of type [Device]: package mirror knows neither files nor networks.
// Clients use the [Mirror] as their disk. It reads from the primary and writes to it, and
// [Mirror.Run] makes the secondary equal. Then [Mirror.Complete] lets the clients go on
// on the secondary, or stops them; [Mirror.Cancel] lets them go on on the primary.
//
// # Invariant
//
// The disk is divided into granules of 64 KiB. For each granule, at each moment, at least one
// of these is true:
//
//   - primary and secondary have the same content;
//   - the granule is dirty: it will be copied;
//   - an operation on it is in flight: a copy, or a change by a client;
//   - an end has lost changes of it that were not flushed, and the mirror has not asked it yet
//     (see [LossCounter]): it asks when an operation on that end has ended, and before it
//     says that the ends are in sync;
//   - the mirror has ended without success: its state is [Cancelled], [Detached] or [Failed].
//
// The state is [InSync] only if nothing is dirty, nothing is in flight, and the secondary
// was flushed after the last change of it, without an error or a loss since.
//
// # Copying
//
// A copy takes dirty granules on which no operation is in flight. It enters itself into
// the table of operations, removes the granules from the dirty set, reads the primary and
// writes the secondary, in this order. After an error they are dirty again before the
// operation leaves the table.
//
// # Changes by clients
//
// In mode [Background] a change is made at the primary only. Its granules become dirty when it
// has ended there, whether it succeeded or not: a copy may have read them before. It never
// waits for the secondary.
//
// In mode [Blocking] a change waits until no copy and no other change that overlaps it is in
// flight. It is made at the primary, then at the secondary, and then answered. So
// overlapping changes are made at both ends in the same order. Granules that are dirty stay so:
// only a copy makes them clean, because a change may cover a part of them only. If the
// secondary fails they become dirty, and the client does not notice.
//
// A mirror begins in mode Background. It changes to Blocking when less than 1 % is dirty,
// or when the dirty set has not shrunk in two passes over the disk: then it cannot converge
// in mode Background. It changes back after an error of the secondary.
//
// A change waits for the secondary for [Config.Stall] at most. Then its range becomes dirty,
// and the client is answered. The write to the secondary may still be carried out later,
// with the mirror's own copy of the data. It stays in the table until it has ended, so nothing is
// copied there meanwhile, and until then all changes are made as in mode Background.
//
// A trim is made at the primary only, and its range becomes dirty: two disks need not have
// the same content after a trim. A flush goes to the primary only.
//
// # Losses
//
// For both ends the mirror knows which granules were changed since they were last flushed. A flush
// covers those changes that had ended before it began. If an end loses what was not flushed, or
// a flush fails, these granules become dirty. If it is the end that clients use, the next
// flush by a client fails.
//
// # Crashes
//
// The dirty set is in memory. If the process dies the primary has all that clients wrote,
// and the secondary is of no use, unless there is an [Intent] log.
package mirror
