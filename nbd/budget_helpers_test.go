package nbd

import (
	"testing"
	"time"
)

// testMeter is a transfers whose numbers the test sets.
type testMeter struct {
	moved   int64
	unknown bool // Progress is not known
}

func (m *testMeter) Total() int64            { return m.moved }
func (m *testMeter) Progress() (int64, bool) { return m.moved, !m.unknown }

// budgetClient is a connection that uses the budget, without a socket.
type budgetClient struct {
	*inflight
	name   string
	meter  *testMeter
	grants []grant
	cuts   int
}

func newClient(b *byteBudget, device, name string) *budgetClient {
	c := &budgetClient{name: name, meter: new(testMeter)}
	c.inflight = newInflight(b, 64, device, c.meter, func() { c.cuts++ })
	return c
}

// asks begins as many of n requests as possible at once, and returns their number.
func (c *budgetClient) asks(n int, bytes int64, p phase) (granted int) {
	for range n {
		g, ok := c.tryBegin(bytes, p)
		if !ok {
			break
		}
		c.grants = append(c.grants, g)
		granted++
	}
	return granted
}

// moves ends the oldest request; its bytes have been transferred.
func (c *budgetClient) moves() {
	g := c.grants[0]
	c.grants = c.grants[1:]
	c.meter.moved += g.bytes
	time.Sleep(measureEvery) // in the bubble's time
	c.end(g)
}

// drops ends all requests without progress, as the end of a connection does.
func (c *budgetClient) drops() {
	for _, g := range c.grants {
		c.end(g)
	}
	c.grants = nil
}

// holds returns the number of bytes of the budget that the connection has.
func (c *budgetClient) holds() int64 {
	c.budget.mu.Lock()
	defer c.budget.mu.Unlock()
	return c.taken
}

// runs has a client begin requests of 2 MiB whenever it may, and end the oldest one
// again and again, for some time. It returns the least memory of the budget that it
// had with a full pipeline in the second half of that time.
func (c *budgetClient) runs(d time.Duration, p phase) (least int64) {
	least = -1
	begin := time.Now()
	for time.Since(begin) < d {
		c.asks(10, 2*mib, p)
		if held := c.holds(); time.Since(begin) > d/2 && (least < 0 || held < least) {
			least = held
		}
		c.moves()
	}
	return least
}

func checkBudget(t *testing.T, b *byteBudget) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	var used, pending int64
	for i := range b.conns {
		used += i.taken
		pending += i.pending
		if i.reserved > reserveSize {
			t.Errorf("a connection has %d bytes in its reserve, want %d at most", i.reserved, reserveSize)
		}
	}
	for _, d := range b.devices {
		pending -= d.pending
	}
	if used != b.used || pending != 0 {
		t.Errorf("%d bytes used and %d pending in excess, connections have %d in all", b.used, -pending, used)
	}
}
