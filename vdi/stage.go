package vdi

import (
	"slices"
	"time"
)

// stage is where an attachment stands in its life. The arrows between stages
// are drawn in the package documentation; arrows is the same picture for the
// program, and a test compares the two.
type stage int

const (
	creating   stage = iota // xapi is being asked for a VBD
	recording               // there is a VBD; its journal entry is being made
	plugging                // the entry is durable; xapi is being asked to plug
	opening                 // plugged; the device is being opened
	attached                // connections read from it
	lingering               // the last connection was lost; the client may come back
	lost                    // the device is not ours any more; connections are ending
	detaching               // closed here; to be unplugged and destroyed
	forgetting              // the VBD is certainly gone; its entry is to go too
	gone                    // nothing is left
	left                    // given up here; Recover goes on with it
)

var stageNames = [...]string{
	"creating", "recording", "plugging", "opening", "attached", "lingering", "lost",
	"detaching", "forgetting", "gone", "left",
}

// Stages returns the stages that an attachment can be in: the values of
// [Status].Stage.
func Stages() []string { return slices.Clone(stageNames[:]) }

func (s stage) String() string { return stageNames[s] }

// arrow is one step from a stage to another.
type arrow struct{ from, to stage }

// arrows are all steps that an attachment may take.
var arrows = []arrow{
	{creating, recording},
	{creating, detaching},
	{recording, plugging},
	{recording, detaching},
	{plugging, opening},
	{plugging, detaching},
	{opening, attached},
	{opening, detaching},
	{attached, lingering},
	{attached, detaching},
	{attached, lost},
	{lingering, attached},
	{lingering, detaching},
	{lost, detaching},
	{detaching, forgetting},
	{detaching, gone},
	{detaching, left},
	{forgetting, gone},
	{forgetting, left},
}

// moveTo takes the attachment to another stage. m.mu is held.
func (a *attachment) moveTo(to stage) {
	step := arrow{a.stage, to}
	if !slices.Contains(arrows, step) {
		// Not worth a crash in the middle of somebody's backup, but never right.
		a.log.Error("unexpected change of an attachment's stage", "from", a.stage.String(), "to", to.String())
	}
	a.stage = to
	if to >= lost && a.endingSince.IsZero() {
		a.endingSince = time.Now()
	}
	if a.m.onStep != nil {
		a.m.onStep(step)
	}
}

// move is moveTo for those who do not hold m.mu.
func (a *attachment) move(to stage) {
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	a.moveTo(to)
}
