package main

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"xapi-nbd/xapi/xapitest"
)

// stressErrors are the errors that xapi returns, by call. None of them denies that an
// existing object exists.
var stressErrors = map[string][][]string{
	"session.login_with_password": {{"HOST_STILL_BOOTING"}, {"INTERNAL_ERROR", "Db_exn.Uniqueness_constraint_violation"}},
	"session.get_record":          {{"HOST_STILL_BOOTING"}},
	"session.get_uuid":            {{"HOST_STILL_BOOTING"}},
	"session.logout":              {{"INTERNAL_ERROR", "Not_found"}},
	"VDI.get_record":              {{"INTERNAL_ERROR", "Not_found"}},
	"SR.get_record":               {{"INTERNAL_ERROR", "Not_found"}, {"HOST_STILL_BOOTING"}},
	"VM.get_by_uuid":              {{"HOST_STILL_BOOTING"}},
	"VBD.get_record":              {{"INTERNAL_ERROR", "Not_found"}, {"HOST_STILL_BOOTING"}},
	"VBD.get_uuid":                {{"INTERNAL_ERROR", "Not_found"}},
	"VBD.create": {
		{"INVALID_DEVICE", "autodetect"},
		{"OTHER_OPERATION_IN_PROGRESS", "VM", "OpaqueRef:vm", "migrate_send", "OpaqueRef:task"},
	},
	"VBD.plug": {
		{"SR_BACKEND_FAILURE_46", "", "The VDI is not available [opterr=VDI locked]", ""},
		{"VDI_IN_USE"},
		{"SR_NOT_ATTACHED", "OpaqueRef:sr"},
		{"VDI_MISSING", "OpaqueRef:sr", "OpaqueRef:vdi"},
		{"OPERATION_NOT_ALLOWED", "VM is shutting down"},
		{"TASK_CANCELLED", "OpaqueRef:task"},
		{"INTERNAL_ERROR", "Subprocess exited with unexpected code 1"},
	},
	"VBD.unplug": {
		{"DEVICE_DETACH_REJECTED", "VBD", "OpaqueRef:vbd", "busy"},
		{"SR_BACKEND_FAILURE_46", "", "The VDI is not available [opterr=in use]", ""},
		{"OTHER_OPERATION_IN_PROGRESS", "VDI", "OpaqueRef:vdi", "snapshot", "OpaqueRef:task"},
		{"CANNOT_CONTACT_HOST", "OpaqueRef:host"},
		{"INTERNAL_ERROR", "Subprocess exited with unexpected code 1"},
	},
	"VBD.destroy": {
		{"OTHER_OPERATION_IN_PROGRESS", "VBD", "OpaqueRef:vbd", "unplug", "OpaqueRef:task"},
		{"INTERNAL_ERROR", "Not_found"},
	},
	"VBD.get_by_uuid": {{"HOST_STILL_BOOTING"}},
}

// How likely it is, per call to xapi, that something happens. A client's first
// connection makes nine calls, and a detach five. Counting calls instead of
// seconds gives slow machines the same load.
const (
	stressDropRate      = 0.01 // each, before and after the call was executed
	stressErrorRate     = 0.02
	stressSteal         = 0.05 // of plugs: undone by another tool before the service has opened the device
	stressLate          = 0.05 // of creates: executed after the service has stopped waiting for it
	stressBlowRate      = 0.01
	stressMeddleRate    = 0.04
	stressNeighbourRate = 0.08
)

// chaos makes faults of xapi and of its host.
type chaos struct {
	s                       *stress
	blows, meddling, nearby chan struct{} // something is due

	deciding sync.RWMutex // held for reading in onCall; guards over
	over     bool

	mu  sync.Mutex
	rng *rand.Rand // guarded by mu: calls come concurrently
}

func newChaos(s *stress, rng *rand.Rand) *chaos {
	due := func() chan struct{} { return make(chan struct{}, 1) }
	return &chaos{s: s, blows: due(), meddling: due(), nearby: due(), rng: rng}
}

// run makes faults until ctx ends. No fault is in effect when it returns.
func (c *chaos) run(ctx context.Context) {
	host := c.s.w.host
	host.OnCall(c.onCall)
	var others sync.WaitGroup
	others.Go(func() { stressEach(ctx, c.meddling, c.meddle) })
	others.Go(func() { stressEach(ctx, c.nearby, c.mindOwnBusiness) })
	stressEach(ctx, c.blows, func() { c.blow(ctx) })
	host.OnCall(nil)
	c.deciding.Lock() // nothing that was decided before may happen later
	c.over = true
	c.deciding.Unlock()
	host.ClearFaults()
	others.Wait()
}

// stressEach does something whenever it is due, until ctx ends.
func stressEach(ctx context.Context, due <-chan struct{}, do func()) {
	for {
		select {
		case <-due:
			do()
		case <-ctx.Done():
			return
		}
	}
}

// blow stops, restarts or hangs xapi as a whole.
func (c *chaos) blow(ctx context.Context) {
	host, count := c.s.w.host, &c.s.count
	switch n := c.intN(100); {
	case n < 45:
		host.Delay(c.anyMethod(), time.Duration(c.intN(10))*time.Millisecond)
	case n < 65:
		host.ClearFaults()
	case n < 77:
		host.DropConnections()
	case n < 87:
		count.restarts.Add(1)
		host.Restart()
	case n < 95:
		count.stops.Add(1)
		host.Stop()
		stressPause(ctx, time.Duration(c.intN(100))*time.Millisecond)
		if err := host.Resume(); err != nil {
			c.s.fail("the simulated host does not come back: %v", err)
		}
	default:
		count.boots.Add(1)
		host.Booting(true)
		stressPause(ctx, time.Duration(c.intN(50))*time.Millisecond)
		host.Booting(false)
	}
}

func (c *chaos) intN(n int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rng.IntN(n)
}

func (c *chaos) chance() float64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rng.Float64()
}

func (c *chaos) anyMethod() string {
	methods := []string{"session.login_with_password", "session.get_record", "VBD.create", "VBD.plug", "VBD.unplug", "VBD.destroy", "VBD.get_record"}
	return methods[c.intN(len(methods))]
}

// onCall injects a fault into some calls, and starts other actions at some.
func (c *chaos) onCall(point xapitest.CallPoint) xapitest.Verdict {
	c.deciding.RLock()
	defer c.deciding.RUnlock()
	if c.over {
		return xapitest.Proceed
	}
	if !point.After {
		c.maybe(c.blows, stressBlowRate)
		c.maybe(c.meddling, stressMeddleRate)
		c.maybe(c.nearby, stressNeighbourRate)
	}
	switch {
	case c.chance() < stressDropRate:
		c.s.count.drops.Add(1)
		return xapitest.Drop
	case point.After && point.Method == "VBD.plug" && c.chance() < stressSteal:
		c.s.steal(c.s.newest())
	case !point.After && point.Method == "VBD.create" && c.chance() < stressLate:
		c.s.w.host.DropConnections()
		stressPause(context.Background(), time.Duration(c.intN(200))*time.Millisecond)
	case !point.After && c.chance() < stressErrorRate:
		if errors := stressErrors[point.Method]; errors != nil {
			c.s.count.apiErrors.Add(1)
			e := errors[c.intN(len(errors))]
			c.s.w.host.Fail(point.Method, e[0], e[1:]...)
		}
	}
	return xapitest.Proceed
}

// maybe makes something due with some probability.
func (c *chaos) maybe(due chan<- struct{}, rate float64) {
	if c.chance() >= rate {
		return
	}
	select {
	case due <- struct{}{}:
	default: // it is already
	}
}

// newest is the youngest plugged VBD of ours, "" if there is none.
func (s *stress) newest() (uuid string) {
	for _, vbd := range s.ours() {
		if vbd.CurrentlyAttached {
			uuid = vbd.UUID
		}
	}
	return uuid
}

// steal unplugs a VBD of ours, as tools do that find it in their way. Where an
// open device keeps it plugged, it is refused.
func (s *stress) steal(uuid string) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s.noteMeddling(s.w.host.UnplugVBD(ctx, uuid))
}

func (s *stress) noteMeddling(err error) {
	if err != nil {
		s.count.refusedMeddling.Add(1)
	} else {
		s.count.meddled.Add(1)
	}
}

// meddle is an administrator, or Xen Orchestra, who tidies up VBDs of the
// control domain without asking whose they are.
func (c *chaos) meddle() {
	ours := c.s.ours()
	if len(ours) == 0 {
		return
	}
	victim := ours[c.intN(len(ours))]
	if victim.CurrentlyAttached {
		c.s.steal(victim.UUID)
	}
	if c.intN(2) == 0 {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		c.s.noteMeddling(c.s.w.host.DestroyVBD(ctx, victim.UUID))
	}
}

// stressNeighbours is how many VBDs other tools have at most.
const stressNeighbours = 8

// mindOwnBusiness is another tool that plugs and unplugs its own VBDs of the disks that the
// service serves.
func (c *chaos) mindOwnBusiness() {
	s, host := c.s, c.s.w.host
	s.checkNeighbours()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	uuid := c.anyNeighbour()
	switch {
	case uuid == "" || len(s.neighbours) < stressNeighbours && c.intN(4) == 0:
		disk := s.disks[c.intN(len(s.disks))]
		added, err := host.AddForeignVBD(disk.uuid, map[string]string{"owner": "somebody else"})
		if err == nil { // else there is no number left
			s.neighbours[added] = false
		}
	case s.neighbours[uuid]:
		// Fails when the service still holds the disk open, of which its own VBD
		// is gone.
		if host.UnplugVBD(ctx, uuid) == nil {
			s.neighbours[uuid] = false
		}
	case c.intN(4) == 0:
		if err := host.DestroyVBD(ctx, uuid); err != nil {
			s.fail("a neighbour's own VBD: %v", err)
		}
		delete(s.neighbours, uuid)
	default:
		if host.PlugForeign(uuid) == nil { // else there is no node left
			s.neighbours[uuid] = true
			s.count.neighbourly.Add(1)
		}
	}
}

// anyNeighbour picks one of the other tools' VBDs, "" if there is none.
func (c *chaos) anyNeighbour() string {
	theirs := slices.Sorted(maps.Keys(c.s.neighbours))
	if len(theirs) == 0 {
		return ""
	}
	return theirs[c.intN(len(theirs))]
}

// checkNeighbours requires that the other tools' VBDs are unchanged.
func (s *stress) checkNeighbours() {
	s.t.Helper()
	found := make(map[string]bool)
	for _, vbd := range s.w.host.VBDs() {
		if vbd.Foreign {
			found[vbd.UUID] = true
			if want := s.neighbours[vbd.UUID]; vbd.CurrentlyAttached != want {
				s.fail("VBD %s of somebody else: attached %v, want %v", vbd.UUID, vbd.CurrentlyAttached, want)
			}
		}
	}
	for uuid := range s.neighbours {
		if !found[uuid] {
			s.fail("VBD %s of somebody else is gone", uuid)
		}
	}
}
