package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"xapi-nbd/nbd/wire"
)

// The pauses between two attempts to make a lost connection again: each is twice as long as
// the one before it. A server that was only restarted is found soon, and one that is away
// for longer is not kept busy.
const (
	firstPause = 100 * time.Millisecond
	maxPause   = 5 * time.Second
)

// interrupted reports whether an error means that the connection was lost, so that the call
// can be repeated over another connection.
func interrupted(err error) bool {
	var (
		lost    *LostError
		stalled *StallError
		network *net.OpError
	)
	return errors.As(err, &lost) || errors.As(err, &stalled) || errors.As(err, &network) ||
		errors.Is(err, wire.ESHUTDOWN) ||
		errors.Is(err, net.ErrClosed) // closed by restore while other calls used it
}

// hopeless reports whether an error of an attempt to connect is final.
func hopeless(err error) bool {
	var (
		refused     *Error
		certificate *tls.CertificateVerificationError
	)
	switch {
	case errors.As(err, &refused):
		return refused.Reply != wire.RepErrUnknown && refused.Reply != wire.RepErrPolicy && refused.Reply != wire.RepErrShutdown
	case errors.As(err, &certificate), errors.Is(err, ErrUnsupported), errors.Is(err, errArgument):
		return true
	}
	var other *otherExportError
	return errors.As(err, &other)
}

// lose removes the connection of a slot and starts the attempts to make it again. The caller
// holds p.mu.
func (p *Pool) lose(s *slot, err error) {
	old := s.conn
	s.conn, s.busy = nil, 0
	p.losses++
	if p.cfg.RetryFor == 0 {
		p.give(s, err)
		p.restoring.Go(func() { old.Close() }) // Pool.Close waits for it
		return
	}
	p.restoring.Go(func() { p.restore(s, old, err) }) // ends with RetryFor, or with Pool.Close
}

// restore makes the connection of a slot again, for RetryFor at most.
func (p *Pool) restore(s *slot, old *Conn, cause error) {
	ctx, cancel := context.WithTimeout(p.ctx, p.cfg.RetryFor)
	defer cancel()
	old.Close()
	notify(p.cfg.Lost, cause)
	for pause := firstPause; ; pause = min(2*pause, maxPause) {
		conn, err := p.open(ctx)
		if err == nil {
			p.put(s, conn)
			return
		}
		if !hopeless(err) && ctx.Err() == nil {
			notify(p.cfg.Failed, err)
			select {
			case <-time.After(pause):
				continue
			case <-ctx.Done():
			}
		}
		if p.ctx.Err() == nil {
			p.giveUp(s, cause, err)
		}
		return
	}
}

// notify calls a function of the configuration, which may be nil.
func notify(f func(error), err error) {
	if f != nil {
		f(err)
	}
}

// put gives a slot its new connection.
func (p *Pool) put(s *slot, conn *Conn) {
	p.mu.Lock()
	s.conn = conn // Close closes it, if it has begun meanwhile
	p.restored++
	p.signal()
	p.mu.Unlock()
	if p.cfg.Restored != nil {
		p.cfg.Restored()
	}
}

// giveUp records that a connection is not made again. Another export ends the Pool; other
// errors end it when no connection is left.
func (p *Pool) giveUp(s *slot, cause, err error) {
	var other *otherExportError
	isOther := errors.As(err, &other)
	switch {
	case isOther:
	case hopeless(err):
		err = fmt.Errorf("%w; connecting again: %w", cause, err)
	default:
		err = fmt.Errorf("%w; not connected again within %v: %w", cause, p.cfg.RetryFor, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if isOther {
		p.end(err)
	}
	p.give(s, err)
}

// give records that a slot has no connection any more. The caller holds p.mu.
func (p *Pool) give(s *slot, err error) {
	s.gone = err
	if !slices.ContainsFunc(p.slots, func(s *slot) bool { return s.gone == nil }) {
		p.end(err)
	}
}

// otherExportError is the error of a connection to another export than the first one.
type otherExportError struct{ text string }

func (e *otherExportError) Error() string {
	return "the server shows another export than before: " + e.text
}

// open makes a connection and compares its export with that of the first connection.
func (p *Pool) open(ctx context.Context) (*Conn, error) {
	conn, err := p.cfg.Open(ctx)
	if err != nil {
		return nil, err
	}
	if err := p.compare(conn); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// compare returns an error if the export of a connection is not that of the first one, or is
// not offered in the same way. New transmission flags do not matter, unless the export has
// become read-only.
func (p *Pool) compare(conn *Conn) error {
	was, is := p.first.Info(), conn.Info()
	same := p.cfg.SameExport
	if same == nil {
		same = func(first, again wire.ExportInfo) bool { return first.Description == again.Description }
	}
	missing := was.Flags &^ is.Flags
	switch before, now := p.first.BlockSizes().Min, conn.BlockSizes().Min; {
	case was.Size != is.Size:
		return &otherExportError{fmt.Sprintf("%d bytes instead of %d", is.Size, was.Size)}
	case !same(was, is):
		return &otherExportError{fmt.Sprintf("%q instead of %q", is.Description, was.Description)}
	case before != now:
		return &otherExportError{fmt.Sprintf("a minimum block size of %d bytes instead of %d", now, before)}
	case is.Flags&^was.Flags&wire.FlagReadOnly != 0:
		return &otherExportError{"it is read-only now"}
	case missing != 0:
		return &otherExportError{fmt.Sprintf("without %v", missing)}
	}
	for _, name := range p.first.MetaContexts() {
		if !slices.Contains(conn.MetaContexts(), name) {
			return fmt.Errorf("the server does not provide the metadata context %s any more", name)
		}
	}
	return nil
}
