package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"xapi-nbd/cmd/internal/progress"
	"xapi-nbd/nbd/client"
)

const (
	// defaultConnections is enough for one source and one destination on fast networks.
	// TLS uses one core per connection.
	defaultConnections = 4
	maxConnections     = 64
	// defaultRequests hides the round trips of ordinary networks.
	defaultRequests = 16
	maxRequests     = 256
)

// copyOptions are the flags of copy.
type copyOptions struct {
	src               exportFlags
	dstFile           string // --dst-uri-file
	connections       int
	requests          int
	destinationIsZero bool
	changedSince      string
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
export or a block device must be at least as large as the source; what it has
beyond that stays as it is. What is known to be zero at the source is not
transferred: it becomes a hole of a file, and is zeroed explicitly elsewhere.

A server that promises consistency between connections (CAN_MULTI_CONN) gets
several, with several requests in flight on each; all of them together use up to
256 MiB of memory. The destination is flushed before the copy counts as done. When
it fails, DST is incomplete.

With --changed-since BASE, DST is an existing full copy of the disk as it was when
BASE was made, such as a snapshot. Only the blocks that have changed since then are
copied into it, and at the end of the disk what a file is too short for. The server has to tell them, in the metadata context
x-xapi:unchanged:BASE or qemu:dirty-bitmap:BASE; BASE is the UUID of a VDI for
xapi-nbd, and the name of a bitmap for QEMU. If the server does not tell them, nothing
is written; a full copy without --changed-since is always possible. When a copy fails
later, DST is neither the old disk nor the new one; the same command repeats it.

With --verify both ends are read again and compared; with --changed-since too, only
the blocks that were copied.

The progress counts the bytes that have to be read from SRC.

Signals:
  SIGINT, SIGTERM  stop with exit code 1, and say how many bytes were copied; a
                   second one ends the process at once`,
		Example: `  nbd-tool copy nbds://host/disk?tls-hostname=pool backup.img
  nbd-tool copy --verify backup.img nbd://localhost/disk
  nbd-tool copy --changed-since 5a9e4b21-6f7c-4f55-9a11-0c3f5e8f7d10 --uri-file uri.txt backup.img
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
	f := cmd.Flags()
	f.SortFlags = false
	f.IntVar(&o.connections, "connections", defaultConnections, "`N` connections to each server that promises consistency between them")
	f.IntVar(&o.requests, "requests", defaultRequests, "`N` requests in flight on each connection")
	f.BoolVar(&o.verify, "verify", false, "read both ends again and compare them")
	f.BoolVar(&o.progress, "progress", false, "write lines about the progress; on a terminal there is a bar without it")
	f.BoolVar(&o.destinationIsZero, "destination-is-zero", false, "trust that DST reads as zeroes all over; wrong data if it does not")
	f.StringVar(&o.changedSince, "changed-since", "", "copy only the blocks that have changed since `BASE`, into a full copy of that")
	bindURIFile(f, "dst-uri-file", &o.dstFile, " of DST")
	o.src.bind(f, " of SRC")
	return cmd
}

func (o *copyOptions) check(args []string) error {
	stream := o.dstFile == "" && args[len(args)-1] == "-"
	switch {
	case o.connections < 1 || o.connections > maxConnections:
		return usagef("--connections is 1 to %d", maxConnections)
	case o.requests < 1 || o.requests > maxRequests:
		return usagef("--requests is 1 to %d", maxRequests)
	case o.dstFile == "-" && (o.src.uriFile == "-" || o.src.host.sessionFile == "-"):
		return usagef("standard input can hold only one URI or session")
	case stream && o.changedSince != "":
		return usagef("--changed-since needs an existing copy, which standard output is not")
	case o.destinationIsZero && o.changedSince != "":
		return usagef("--changed-since changes a copy, which does not read as zeroes all over")
	case stream && o.verify:
		return usagef("--verify cannot read what went to standard output")
	}
	return nil
}

// sides parses SRC and DST.
func (o *copyOptions) sides(args []string, in *secretInput) (src, dst side, err error) {
	if o.src.named() {
		src.uri, err = o.src.uri("", in)
	} else {
		src, err = parseSide(args[0], in)
		args = args[1:]
	}
	if err != nil {
		return src, dst, err
	}
	if o.dstFile != "" {
		dst, err = readSide(o.dstFile, in)
	} else {
		dst, err = parseSide(args[0], in)
	}
	if err != nil {
		return src, dst, err
	}
	if o.changedSince != "" && src.uri == nil {
		return src, dst, usagef("--changed-since needs an export as SRC: the changed blocks of a file are not known")
	}
	if src.path == "-" {
		return src, dst, usagef("SRC cannot be standard input: its size is not known")
	}
	if o.src.connect.aboutTLS() && !src.overTLS() && !dst.overTLS() {
		return src, dst, errNeedsTLS
	}
	return src, dst, errors.Join(o.connect(&src), o.connect(&dst))
}

// side is one of the two arguments of copy: an export or a path.
type side struct {
	uri  *client.URI // or nil
	nbd  *target     // the same, with what the flags say
	path string
}

func (s side) overTLS() bool { return s.uri != nil && s.uri.TLS }

func parseSide(text string, in *secretInput) (side, error) {
	if !looksLikeURI(text) {
		return side{path: text}, nil
	}
	u, err := in.parseURI(text)
	return side{uri: u}, err
}

func readSide(file string, in *secretInput) (side, error) {
	text, err := in.readLine(file, "URI")
	if err != nil {
		return side{}, err
	}
	u, err := in.parseURI(text)
	return side{uri: u}, err
}

// connect adds the settings of the flags. Those for TLS apply to the sides with TLS.
func (o *copyOptions) connect(s *side) (err error) {
	if s.uri == nil {
		return nil
	}
	flags := &o.src.connect
	if !s.uri.TLS {
		flags = flags.withoutTLS()
	}
	s.nbd, err = flags.target(s.uri)
	return err
}

// looksLikeURI reports whether an argument is a URI. For a file with such a name the user
// writes ./nbd:….
func looksLikeURI(s string) bool {
	scheme, _, found := strings.Cut(s, ":")
	scheme = strings.ToLower(scheme)
	return found && (strings.Contains(s, "://") && !strings.Contains(scheme, "/") ||
		scheme == "nbd" || scheme == "nbds" || scheme == "nbd+unix" || scheme == "nbds+unix")
}

// run opens both ends, copies, verifies and closes them.
func (o *copyOptions) run(cmd *cobra.Command, args []string, std streams) (err error) {
	if err := o.check(args); err != nil {
		return err
	}
	srcSide, dstSide, err := o.sides(args, newSecretInput(cmd))
	if err != nil {
		return err
	}
	ctx := cmd.Context()
	src, err := o.openSource(ctx, srcSide)
	if err != nil {
		return err
	}
	defer src.close()
	c := &copier{src: src, requests: o.requests}
	if o.changedSince != "" {
		if c.changes, err = changesSince(src.(*exportEnd), o.changedSince); err != nil {
			return err
		}
	}
	if dstSide.path == "-" {
		if err := o.startMeter(ctx, c, std.err); err != nil {
			return err
		}
		err := c.stream(ctx, std.out)
		c.meter.Finish()
		return incomplete(ctx, c, "what was written", err)
	}
	length := src.size()
	if c.changes != nil && dstSide.nbd == nil {
		length = lengthOf(dstSide.path, length)
		c.changes.copyFrom(length)
	}
	if c.dst, err = o.openDestination(ctx, dstSide, srcSide, src.size()); err != nil {
		return err
	}
	if extra := c.dst.size() - src.size(); extra > 0 {
		fmt.Fprintf(cmd.ErrOrStderr(), "nbd-tool: the destination is larger: its last %d bytes stay as they are\n", extra)
	}
	err = errors.Join(o.transfer(ctx, c, std.err), c.dst.close())
	if err != nil && length < src.size() {
		// So that the same command copies the end again.
		err = errors.Join(err, os.Truncate(dstSide.path, length))
	}
	return err
}

// transfer copies and verifies between open ends.
func (o *copyOptions) transfer(ctx context.Context, c *copier, stderr io.Writer) error {
	if err := o.startMeter(ctx, c, stderr); err != nil {
		return err
	}
	err := c.copy(ctx)
	if err == nil {
		err = c.dst.flush(ctx)
	}
	c.meter.Finish()
	if err != nil {
		return incomplete(ctx, c, c.dst.name(), err)
	}
	if !o.verify {
		return nil
	}
	compare := c.src.size()
	if c.changes != nil {
		compare = 0
		if err := c.plan(ctx, func(t task) error { compare += t.n; return nil }); err != nil {
			return err
		}
	}
	c.meter = progress.New(stderr, "verifying", compare, o.progress)
	defer c.meter.Finish()
	if err := c.verify(ctx); err != nil {
		return fmt.Errorf("verification: %w", endOf(ctx, err))
	}
	return nil
}

// startMeter begins to count the bytes that have to be read.
func (o *copyOptions) startMeter(ctx context.Context, c *copier, stderr io.Writer) error {
	n, err := c.dataBytes(ctx)
	if err != nil {
		return err
	}
	c.total = n
	c.meter = progress.New(stderr, "copying", n, o.progress)
	return nil
}

// incomplete returns the error of an unfinished copy. what names the incomplete result.
func incomplete(ctx context.Context, c *copier, what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("stopped after %d of %d bytes, %s is incomplete: %w", c.meter.Done(), c.total, what, endOf(ctx, err))
}

// endOf returns the cause of the end of ctx if it has ended, because err is then only a
// consequence, and err otherwise.
func endOf(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}
