package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"time"

	"xapi-nbd/cmd/nbd-tool/internal/copying"
	"xapi-nbd/cmd/nbd-tool/internal/mirroring"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

// mirrorSides parses PRIMARY and SECONDARY.
func (o *mirrorOptions) mirrorSides(args []string, in *secretInput) (primary, secondary side, err error) {
	for _, end := range []struct {
		file string
		to   *side
	}{{o.primaryFile, &primary}, {o.secondaryFile, &secondary}} {
		if end.file != "" {
			*end.to, err = readSide(end.file, in)
		} else {
			*end.to, err = parseSide(strings.TrimPrefix(args[0], "file://"), in)
			args = args[1:]
		}
		if err != nil {
			return primary, secondary, err
		}
		if end.to.path == "-" {
			return primary, secondary, usagef("an end of a mirror cannot be a stream")
		}
	}
	if o.connect.aboutTLS() && !primary.overTLS() && !secondary.overTLS() {
		return primary, secondary, errNeedsTLS
	}
	return primary, secondary, errors.Join(o.connect.addTo(&primary), o.connect.addTo(&secondary))
}

// mirrorEnds are the two open ends of a mirror.
type mirrorEnds struct {
	primary, secondary *mirroring.End
	made               string // the file of the secondary that was made; "" if it existed
}

// openEnds opens both ends for writing and locks them. It writes to none of them.
func (o *mirrorOptions) openEnds(ctx context.Context, primary, secondary side, n *notices) (*mirrorEnds, error) {
	first, err := o.openEnd(ctx, primary, n)
	if err != nil {
		return nil, fmt.Errorf("primary: %w", err)
	}
	ends := &mirrorEnds{primary: first}
	if secondary.uri == nil {
		ends.made, err = makeFile(secondary.path, first.Size())
	}
	if err == nil {
		ends.secondary, err = o.openEnd(ctx, secondary, n)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("secondary: %w", err), ends.undo())
	}
	return ends, nil
}

// makeFile makes a file that reads as zeroes, unless it exists. It returns the path if the file
// was made.
func makeFile(path string, size int64) (made string, err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if errors.Is(err, fs.ErrExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return "", errors.Join(err, os.Remove(path))
	}
	return path, nil
}

// openEnd opens an export, a file or a block device, and locks the last two.
func (o *mirrorOptions) openEnd(ctx context.Context, s side, n *notices) (*mirroring.End, error) {
	if s.nbd == nil {
		e, err := copying.OpenFileExclusively(s.path)
		if errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EBUSY) {
			return nil, fmt.Errorf("%s is in use by another process, or is mounted: %w", s.path, err)
		}
		if err != nil {
			return nil, err
		}
		return mirroring.NewEnd(e), nil
	}
	e, err := openPool(ctx, s, o.connections, o.retryFor, n, wire.BaseAllocation)
	if err != nil {
		return nil, err
	}
	if e.Pool().Info().Flags&wire.FlagReadOnly != 0 {
		return nil, errors.Join(fmt.Errorf("%s: the export is read-only", e.Name()), e.Close())
	}
	return mirroring.NewEnd(e), nil
}

// openPool opens an export with several connections, which are made again when they are lost.
func openPool(ctx context.Context, s side, connections int, retryFor time.Duration, all *notices, contexts ...string) (*copying.Export, error) {
	server := s.uri.Server()
	notices := all.of(server)
	pool, err := client.NewPool(ctx, client.PoolConfig{
		Open:        func(ctx context.Context) (*client.Conn, error) { return s.nbd.open(ctx, contexts...) },
		Connections: connections,
		RetryFor:    retryFor,
		SameExport: func(first, again wire.ExportInfo) bool {
			return vdiOf(s.uri.Export) != "" || first.Description == again.Description
		},
		Lost: notices.lost, Failed: notices.failed, Restored: notices.restored,
	})
	if err != nil {
		return nil, err
	}
	return copying.NewExport(pool, server, s.nbd.hint), nil
}

// undo closes the ends of a mirror that did not begin, and removes the file that was made.
func (e *mirrorEnds) undo() error {
	err := e.close()
	if e.made != "" {
		err = errors.Join(err, os.Remove(e.made))
	}
	return err
}

// close closes both ends.
func (e *mirrorEnds) close() error {
	err := e.primary.Close()
	if e.secondary != nil {
		err = errors.Join(err, e.secondary.Close())
	}
	return err
}

// check returns an error if a file is not at its path any more, or an end has another size: then
// what was copied is not what its name says.
func (e *mirrorEnds) check() error {
	for _, end := range []*mirroring.End{e.primary, e.secondary} {
		if c, ok := end.End.(interface{ Check() error }); ok {
			if err := c.Check(); err != nil {
				return err
			}
		}
	}
	return nil
}

// warnAboutPromises prints what the servers at the ends do not promise.
func (e *mirrorEnds) warnAboutPromises(n *notices) {
	for _, end := range []*mirroring.End{e.primary, e.secondary} {
		if end.Primitive() {
			n.print("warning: %s offers only reading and writing, as tapdisk's server does: requests are whole sectors of 512 bytes, 8 at a time", end.Name())
		}
	}
	if !e.primary.CanFlush() {
		n.print("warning: %s cannot flush, so clients cannot: what they write may be lost with its power", e.primary.Name())
	}
	if !e.secondary.CanFlush() {
		n.print("warning: %s cannot flush: a completed mirror may lose writes with its power, and after --pivot flushes of clients do nothing", e.secondary.Name())
	}
}
