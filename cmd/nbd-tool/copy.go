package main

import (
	"strings"
	"time"

	"github.com/spf13/cobra"
)

const (
	// defaultConnections is enough for one source and one destination on fast networks.
	// TLS uses one core per connection.
	defaultConnections = 4
	maxConnections     = 64
	// defaultRequests hides the round trips of ordinary networks.
	defaultRequests = 16
	maxRequests     = 256
	// defaultRetry is longer than it takes to restart a server, or to move an address.
	defaultRetry = time.Minute
)

// copyOptions are the flags of copy.
type copyOptions struct {
	src               exportFlags
	dstFile           string // --dst-uri-file
	connections       int
	requests          int
	destinationIsZero bool
	largerDestination bool
	changedSince      string
	bitmap            string // a file
	resume            string // a file
	retryFor          time.Duration
	rate              byteRate
	progress, verify  bool
}

func newCopyCommand(std streams) *cobra.Command {
	var o copyOptions
	cmd := &cobra.Command{
		Use:   "copy [flags] SRC DST",
		Short: "Copy between exports, files and block devices",
		Long: `Copy SRC to DST. Each is an NBD URI, a file or a block device; DST may be - for
a stream on standard output. --uri-file, or --host with its flags, stand for SRC,
--dst-uri-file for DST.

A file is created or overwritten, and has the size of the source afterwards. An
export or a block device must have the size of the source. With --larger-destination it
may be larger; what it has beyond the source stays as it is. SRC and DST must not be
the same disk.

What is known to be zero at the source is not transferred. It becomes a hole of a
file. Elsewhere it is zeroed, except where DST is known to read as zeroes already, so
that a thin disk stays thin. For a new disk --destination-is-zero saves even the asking.

A server that promises consistency between connections (CAN_MULTI_CONN) gets
several, with several requests in flight on each; all of them together use up to
256 MiB of memory. The destination is flushed before the copy counts as done. When
it fails, DST is incomplete.

Increments: DST is an existing full copy of the disk as it was at some earlier time,
such as a snapshot, and only the blocks that have changed since then are copied into it,
and at the end of the disk what a file is too short for.
  --changed-since BASE  asks the server of SRC for the changed blocks, in the metadata
                        context x-xapi:unchanged:BASE or qemu:dirty-bitmap:BASE. BASE
                        is the UUID of a VDI for xapi-nbd, and the name of a bitmap for
                        QEMU. If the server does not tell them, nothing is written
  --bitmap FILE         has the changed blocks in FILE: the output of
                        xe vdi-list-changed-blocks, or the same bytes without base64.
                        Its length must be the right one for SRC
When the copy fails, DST is neither the old disk nor the new one; the same command
repeats it. Only if DST was a file that is too short and nbd-tool was killed, the next
copy must be a full one, unless the first one had --resume. A full copy is always possible.

Interruptions: a lost connection is made again, with growing pauses, for as long as
--retry-for says, and the requests that were in flight are repeated. What was written to
DST and not flushed before the loss is written again. A connection is lost if the server
closes it, shuts down, or makes no progress for as long as --timeout says. While connecting
again, refusals as unknown or by policy count as temporary, as a server that has just
started may have such reasons. These end the copy at once: an error that the server
reports for a request, such as EIO or ENOSPC; an invalid certificate; another kind of
refusal; another size or description of the export than before. The first connection
is tried only once.

With --resume FILE the progress is kept in FILE, and when FILE exists, the copy goes on
where it stopped, even if nbd-tool or its machine was killed. A range counts as copied
when DST has flushed it. SRC and DST must be the same as before, as far as their names,
sizes, inodes and the modification time of a source file show. SRC itself must not have
changed, as with a snapshot. FILE is removed when the copy is complete.

With --verify both ends are read again and compared; in an increment, only the blocks that
were copied.

The progress counts the bytes that have to be read from SRC.

Signals:
  SIGINT, SIGTERM  stop with exit code 1, and say how many bytes were copied; a
                   second one ends the process at once`,
		Example: `  nbd-tool copy nbds://host/disk?tls-hostname=pool backup.img
  nbd-tool copy --verify backup.img nbd://localhost/disk
  nbd-tool copy --retry-for 10m --resume copy.state nbd://one/disk nbd://two/disk
  nbd-tool copy --changed-since 5a9e4b21-6f7c-4f55-9a11-0c3f5e8f7d10 --uri-file uri.txt backup.img
  nbd-tool copy --bitmap changed.txt --uri-file uri.txt backup.img
  nbd-tool copy --uri-file - - < uri.txt | zstd > backup.zst`,
		DisableFlagsInUseLine: true,
		Args: func(_ *cobra.Command, args []string) error {
			want := 2
			if o.src.named() {
				want--
			}
			if o.dstFile != "" {
				want--
			}
			if len(args) != want {
				return usagef("want SRC and DST, or flags in their place")
			}
			return o.src.check(false)
		},
		RunE: action(func(cmd *cobra.Command, args []string) error { return o.run(cmd, args, std) }),
	}
	o.bind(cmd)
	return cmd
}

func (o *copyOptions) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	f.SortFlags = false
	f.IntVar(&o.connections, "connections", defaultConnections, "`N` connections to each server that promises consistency between them")
	f.IntVar(&o.requests, "requests", defaultRequests, "`N` requests in flight on each connection")
	f.BoolVar(&o.verify, "verify", false, "read both ends again and compare them")
	f.BoolVar(&o.progress, "progress", false, "write lines about the progress; on a terminal there is a bar without it")
	f.BoolVar(&o.destinationIsZero, "destination-is-zero", false, "trust that DST reads as zeroes all over; wrong data if it does not")
	f.BoolVar(&o.largerDestination, "larger-destination", false, "accept an export or a block device that is larger than SRC")
	f.StringVar(&o.changedSince, "changed-since", "", "copy only the blocks that have changed since `BASE`, into a full copy of that")
	f.StringVar(&o.bitmap, "bitmap", "", "copy only the blocks that have changed by the bitmap in `FILE`, into a full copy")
	f.StringVar(&o.resume, "resume", "", "keep the progress in `FILE`, and go on from there if it exists")
	f.DurationVar(&o.retryFor, "retry-for", defaultRetry, "`DURATION` for which a lost connection is made again; 0 is not at all")
	f.Lookup("retry-for").DefValue = strings.TrimSuffix(defaultRetry.String(), "0s") // help says 1m
	f.Var(&o.rate, "rate-limit", "read at most `BYTES` per second from SRC, such as 50M; 0 is no limit")
	bindURIFile(f, "dst-uri-file", &o.dstFile, " of DST")
	o.src.bind(f, " of SRC")
}

// increment reports whether only changed blocks are copied.
func (o *copyOptions) increment() bool { return o.changedSince != "" || o.bitmap != "" }

func (o *copyOptions) check(args []string) error {
	stream := o.dstFile == "" && args[len(args)-1] == "-"
	switch {
	case o.connections < 1 || o.connections > maxConnections:
		return usagef("--connections is 1 to %d", maxConnections)
	case o.requests < 1 || o.requests > maxRequests:
		return usagef("--requests is 1 to %d", maxRequests)
	case o.retryFor < 0:
		return usagef("--retry-for must be 0 or more, such as 60s")
	case o.dstFile == "-" && (o.src.uriFile == "-" || o.src.host.sessionFile == "-"):
		return usagef("standard input can hold only one URI or session")
	case o.changedSince != "" && o.bitmap != "":
		return usagef("--changed-since and --bitmap both name the changed blocks")
	case stream && o.increment():
		return usagef("--changed-since and --bitmap need an existing copy, which standard output is not")
	case o.destinationIsZero && o.increment():
		return usagef("--changed-since and --bitmap change a copy, which does not read as zeroes all over")
	case stream && o.verify:
		return usagef("--verify cannot read what went to standard output")
	case stream && o.resume != "":
		return usagef("--resume cannot go on with what went to standard output")
	}
	return nil
}
