package vdi_test

import (
	"sync"
	"testing"

	"xapi-nbd/vdi/changes"
	"xapi-nbd/xapi/xapitest"
)

// once runs do before the first call of a method that is executed from now on.
func (f *chainFixture) once(method string, do func()) {
	var first sync.Once
	f.host.OnCall(func(c xapitest.CallPoint) xapitest.Verdict {
		if c.Method == method && !c.After {
			first.Do(do)
		}
		return xapitest.Proceed
	})
}

// TestBlocksOfAGrownDisk has a disk grow after its map was read: the new range counts as data.
func TestBlocksOfAGrownDisk(t *testing.T) {
	f := newChangedFixture(t)
	before := f.attachSince(f.base)
	if got := data(t, before); !equal(got, 0, 3, 5, 6) {
		t.Errorf("got the blocks %d, want 0, 3, 5 and 6", got)
	}
	do(t, f.host.ResizeVDI(f.vdi, 10*blockSize))
	after := f.attachSince(f.base)
	if got := data(t, after); !equal(got, 0, 3, 5, 6, 8, 9) {
		t.Errorf("after it has grown: got the blocks %d, want 8 and 9 too", got)
	}
	m, ok := after.Changes(f.base)
	if got := m.Unchanged(8*blockSize, 2*blockSize); !ok || len(got) != 1 || got[0] != (changes.Extent{Length: 2 * blockSize}) {
		t.Errorf("what has come: got %v, %t, want it changed, with data", got, ok)
	}
	f.content = append(f.content, make([]byte, 2*blockSize)...)
	copy(f.content[5*blockSize:], blockContent(5))
	copy(f.content[6*blockSize:], blockContent(6))
	f.wantContent(after)
	leave(before)
	leave(after)
	f.closeManager()
}

// TestChangedBlocksOfADiskThatGrows has the disk grow after xapi has returned the changed
// blocks, before it is attached: the new range counts as changed.
func TestChangedBlocksOfADiskThatGrows(t *testing.T) {
	f := newChangedFixture(t)
	f.once("VBD.create", func() { do(t, f.host.ResizeVDI(f.vdi, 10*blockSize)) })
	d := f.attachSince(f.base)
	m, ok := d.Changes(f.base)
	if !ok || d.Size() != 10*blockSize {
		t.Fatalf("changed blocks are known: %t, size: %d, want %d", ok, d.Size(), 10*blockSize)
	}
	if got := m.Unchanged(7*blockSize, 3*blockSize); len(got) != 2 || got[0] != (changes.Extent{Length: blockSize, Status: changes.Unchanged}) ||
		got[1] != (changes.Extent{Length: 2 * blockSize, Status: changes.ChangedToZero}) {
		t.Errorf("got %v, want the last two blocks changed to zeroes", got)
	}
	leave(d)
	f.closeManager()
}

// TestRestartAfterChangedBlocks has xapi restart after it has told the changed blocks,
// before a step of the attaching: a client that comes again is told, and nothing is left.
func TestRestartAfterChangedBlocks(t *testing.T) {
	for _, method := range []string{"VBD.create", "VBD.plug", "VDI.get_record"} {
		t.Run(method, func(t *testing.T) {
			f := newChangedFixture(t)
			told := false
			var restart sync.Once
			f.host.OnCall(func(c xapitest.CallPoint) xapitest.Verdict {
				switch {
				case c.Method == "VDI.list_changed_blocks" && c.After:
					told = true
				case c.Method == method && !c.After && told:
					restart.Do(f.host.Restart)
				}
				return xapitest.Proceed
			})
			d, err := f.manager.Attach(t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi, f.base)
			if err == nil { // nothing that the client's session was needed for was lost
				if !d.KnowsChanges(f.base) {
					t.Error("attached without the changed blocks that xapi has told")
				}
				leave(d)
				<-f.manager.Gone(f.vdi)
			}
			d = f.attachSince(f.base)
			if m, ok := d.Changes(f.base); !ok || !equal(dirty(m, d.Size()), 5*32, 6*32) {
				t.Error("a client that comes again is not told the changed blocks")
			}
			leave(d)
			f.closeManager()
			f.wantClean()
		})
	}
}
