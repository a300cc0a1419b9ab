package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"xapi-nbd/nbd/client"
	"xapi-nbd/xapi/xapitest"
)

// stressMaxRead is the longest read of a stress test's client.
const stressMaxRead = 128 << 10

// stressCount counts events of all rounds.
type stressCount struct {
	connections, softly, reads, bytes, writes, failed atomic.Int64
	calls, apiErrors, drops, restarts, stops, boots   atomic.Int64
	meddled, refusedMeddling, neighbourly, recovered  atomic.Int64
	abrupt, idle, loggedOut, inHaggling, duringTheAsk atomic.Int64

	mu       sync.Mutex
	refusals map[string]int
}

func (c *stressCount) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d connections (%d ended softly, %d abruptly, %d after a pause, %d logged out), %d ended in haggling, %d while asking\n",
		c.connections.Load(), c.softly.Load(), c.abrupt.Load(), c.idle.Load(), c.loggedOut.Load(), c.inHaggling.Load(), c.duringTheAsk.Load())
	fmt.Fprintf(&b, "%d reads of %d bytes right, %d writes, %d of both failed\n", c.reads.Load(), c.bytes.Load(), c.writes.Load(), c.failed.Load())
	fmt.Fprintf(&b, "%d xapi calls, %d answered with errors, %d dropped, %d restarts, %d stops, %d times booting\n",
		c.calls.Load(), c.apiErrors.Load(), c.drops.Load(), c.restarts.Load(), c.stops.Load(), c.boots.Load())
	fmt.Fprintf(&b, "others unplugged or destroyed our VBDs %d times, were refused %d times, and used %d of their own\n",
		c.meddled.Load(), c.refusedMeddling.Load(), c.neighbourly.Load())
	fmt.Fprintf(&b, "cleanup removed %d VBDs", c.recovered.Load())
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, text := range slices.Sorted(maps.Keys(c.refusals)) {
		fmt.Fprintf(&b, "\nrefused %d times: %s", c.refusals[text], text)
	}
	return b.String()
}

// missing returns the name of an event that must happen and has not yet, "" without one.
func (c *stressCount) missing() string {
	for what, n := range map[string]*atomic.Int64{
		"connections": &c.connections, "reads": &c.reads, "writes": &c.writes, "API errors": &c.apiErrors, "dropped calls": &c.drops,
		"restarts of xapi": &c.restarts, "foreign unplugs": &c.meddled,
	} {
		if n.Load() == 0 {
			return what
		}
	}
	return ""
}

func (c *stressCount) refused(text string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refusals == nil {
		c.refusals = make(map[string]int)
	}
	c.refusals[text]++
}

// stressClient is one client, which connects again and again. Its session lasts until it logs
// out or xapi has forgotten it.
type stressClient struct {
	s       *stress
	rng     *rand.Rand
	dialer  net.Dialer
	own     *stressDisk // the one that it writes, nil of most clients
	session string
}

func newStressClient(s *stress, i int, rng *rand.Rand) *stressClient {
	// From several addresses: one host may not have so many that negotiate.
	const addresses = 16
	from := &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(1+i%addresses))}
	c := &stressClient{s: s, rng: rng, dialer: net.Dialer{LocalAddr: from}}
	if i < stressWriters {
		c.own = &s.disks[stressVDIs-1-i]
	}
	return c
}

// run makes one connection after the other, at least one.
func (c *stressClient) run(ctx context.Context) {
	defer c.logOut()
	for {
		d, writes := c.choose()
		served := true
		switch n := c.rng.IntN(10); {
		case n == 0:
			c.leaveHaggling(d)
		case n == 1:
			c.hangUp(ctx, d)
		case n < 4 && !writes:
			served = c.oldWay(d)
		default:
			served = c.transfer(ctx, d, writes)
		}
		if !served {
			stressPause(ctx, c.upTo(200*time.Millisecond))
		}
		if ctx.Err() != nil {
			return
		}
	}
}

// choose returns a disk at random, and whether to write it. A client that owns a disk writes
// that one nearly always, and the other clients rarely choose it: a writer is refused while
// anybody else has the disk. They choose a few disks often, and so share them.
func (c *stressClient) choose() (d *stressDisk, writes bool) {
	n := c.rng.IntN(16)
	switch {
	case n == 0:
		return &c.s.disks[c.rng.IntN(stressVDIs)], c.rng.IntN(2) == 0
	case c.own != nil:
		return c.own, true
	case n < 8:
		return &c.s.disks[c.rng.IntN(stressShared)], false
	default:
		return &c.s.disks[c.rng.IntN(stressVDIs-stressWriters)], false
	}
}

func (c *stressClient) upTo(d time.Duration) time.Duration {
	return time.Duration(c.rng.Int64N(int64(d) + 1))
}

// exportName returns the disk's export name, with the client's session or a new one.
func (c *stressClient) exportName(d *stressDisk) string {
	if c.session == "" {
		role := xapitest.RoleVMAdmin
		if c.rng.IntN(50) == 0 {
			role = xapitest.RoleReadOnly // may not plug
		}
		c.session = c.s.newSession(role)
	}
	return c.s.w.host.ExportName(d.uuid, c.session)
}

func (c *stressClient) logOut() {
	c.s.w.host.ExpireSession(c.session)
	c.session = ""
}

// dial connects. The service listens in every state of xapi.
func (c *stressClient) dial(ctx context.Context) net.Conn {
	nc, err := c.dialer.DialContext(ctx, "tcp", c.s.p.addr)
	if err != nil {
		c.s.fail("cannot connect: %v", err)
		return nil
	}
	return nc
}

// greet connects. It returns the client, nil if it was refused, and its connection, with
// which the caller can end it abruptly.
func (c *stressClient) greet(ctx context.Context) (*client.Client, net.Conn) {
	nc := c.dial(ctx)
	if nc == nil {
		return nil, nil
	}
	cfg := &client.Config{NoExtended: c.rng.IntN(2) == 0, NoStructured: c.rng.IntN(4) == 0}
	if c.rng.IntN(3) == 0 {
		cfg.TLSConfig = c.s.w.trust.Client
	}
	opened, err := client.New(ctx, nc, cfg)
	if err != nil {
		c.refused("greeting", err)
		nc.Close()
		return nil, nil
	}
	return opened, nc
}

// refused counts a refusal by its reason. A client whose session was rejected gets a new one.
func (c *stressClient) refused(what string, err error) {
	c.checkStuck(what, err)
	if ref := strings.TrimPrefix(c.session, "OpaqueRef:"); ref != "" && strings.Contains(err.Error(), ref) {
		c.s.fail("%s: the refusal contains the session", what)
	}
	var refusal *client.Error
	if !errors.As(err, &refusal) {
		c.s.count.refused("(connection closed)")
		return
	}
	text, _, _ := strings.Cut(refusal.Text, ` ["`)
	text, _, _ = strings.Cut(text, ": VBD ") // of a rule about another VBD
	c.s.count.refused(text)
	if strings.Contains(text, "session rejected") || strings.Contains(text, "missing permission") {
		c.logOut()
	}
}

// checkStuck fails the test if an operation was ended by its timeout.
func (c *stressClient) checkStuck(what string, err error) {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		c.s.fail("%s is stuck: %v", what, err)
	}
}

// transfer opens an export, reads, and ends the connection in a random way.
func (c *stressClient) transfer(ctx context.Context, d *stressDisk, writes bool) (served bool) {
	limit, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	opened, nc := c.greet(limit)
	if opened == nil {
		return false
	}
	name := c.exportName(d)
	if writes {
		name += "&mode=rw"
	}
	if c.rng.IntN(8) == 0 {
		if _, err := opened.Info(limit, name); err != nil {
			c.refused("NBD_OPT_INFO", err)
		}
	}
	conn, err := opened.Go(limit, name)
	if err != nil {
		c.refused("NBD_OPT_GO", err)
		_ = opened.Abort()
		return false
	}
	c.s.count.connections.Add(1)
	if conn.Size() != stressDiskSize {
		c.s.fail("VDI %s: size %d, want %d", d.uuid, conn.Size(), stressDiskSize)
	}
	for range c.rng.IntN(8) {
		if writes && !c.write(limit, conn, d) {
			break
		}
		if c.read(limit, conn, d, 1+c.rng.IntN(4))() > 0 {
			break
		}
	}
	c.end(ctx, limit, conn, nc, d)
	return true
}

// end ends a connection in a random way.
func (c *stressClient) end(ctx, limit context.Context, conn *client.Conn, nc net.Conn, d *stressDisk) {
	defer conn.Close() // with NBD_CMD_DISC, unless it has ended before
	switch c.rng.IntN(6) {
	case 0, 1:
		c.s.count.softly.Add(1)
	case 2, 3:
		c.s.count.abrupt.Add(1)
		wait := c.read(limit, conn, d, 1+c.rng.IntN(8))
		nc.Close()
		wait()
	case 4:
		c.s.count.idle.Add(1)
		stressPause(ctx, c.upTo(200*time.Millisecond))
		c.read(limit, conn, d, 1)()
	default:
		c.s.count.loggedOut.Add(1)
		c.logOut()
		// It ends soon, or never if xapi has just restarted.
		for range 20 {
			if c.read(limit, conn, d, 1)() > 0 {
				return
			}
			stressPause(ctx, 5*time.Millisecond)
		}
	}
}

// read starts n reads at random offsets. wait waits for them and returns how many failed; the
// others have returned the right bytes.
func (c *stressClient) read(ctx context.Context, conn *client.Conn, d *stressDisk, n int) (wait func() (failed int)) {
	var reads sync.WaitGroup
	var failures atomic.Int32
	for range n {
		p := make([]byte, 1+c.rng.IntN(stressMaxRead))
		off := c.rng.IntN(stressDiskSize - len(p) + 1)
		reads.Go(func() {
			if err := conn.Read(ctx, p, int64(off)); err != nil {
				c.checkStuck("NBD_CMD_READ", err)
				c.s.count.failed.Add(1)
				failures.Add(1)
				return
			}
			c.s.compare(d, off, p)
		})
	}
	return func() int {
		reads.Wait()
		return int(failures.Load())
	}
}

// write writes the disk's own content at a random offset, and reports whether it succeeded.
func (c *stressClient) write(ctx context.Context, conn *client.Conn, d *stressDisk) bool {
	const sector = 512
	n := sector * (1 + c.rng.IntN(stressMaxRead/sector))
	off := c.rng.IntN(stressDiskSize-n+1) / sector * sector
	if err := conn.Write(ctx, d.content[off:off+n], int64(off), c.rng.IntN(4) == 0); err != nil {
		c.checkStuck("NBD_CMD_WRITE", err)
		c.s.count.failed.Add(1)
		return false
	}
	c.s.count.writes.Add(1)
	return true
}

// compare compares bytes that were read with the content of the disk.
func (s *stress) compare(d *stressDisk, off int, got []byte) {
	s.count.reads.Add(1)
	s.count.bytes.Add(int64(len(got)))
	if !bytes.Equal(got, d.content[off:off+len(got)]) {
		s.fail("VDI %s: %d bytes at %d are wrong: %s\n%s", d.uuid, len(got), off, s.origin(got), s.said(d.uuid))
	}
}

// origin names the disk from which wrong bytes come, if their beginning identifies one.
func (s *stress) origin(got []byte) string {
	begin := got[:min(len(got), 64)]
	for _, d := range s.disks {
		if at := bytes.Index(d.content, begin); at >= 0 {
			return fmt.Sprintf("they are those of VDI %s at %d", d.uuid, at)
		}
	}
	return fmt.Sprintf("%x… is on no disk", begin)
}
