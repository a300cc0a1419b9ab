package vdi

import (
	"slices"
	"time"
)

// stage is the state of an attachment. The package documentation lists the transitions
// between stages; a test compares that list with the table transitions.
type stage int

const (
	creating   stage = iota // xapi is being asked for a VBD
	recording               // there is a VBD; its journal entry is being made
	plugging                // the entry is durable; xapi is being asked to plug
	opening                 // plugged; the device is being opened
	attached                // connections read from it
	lingering               // the last connection was lost; the client may reconnect
	lost                    // the device was taken away; connections are ending
	detaching               // the device is being closed, the VBD unplugged and destroyed
	forgetting              // the VBD does not exist any more; its entries are being removed
	gone                    // nothing is left
	left                    // the detach failed; the VBD is a leftover
)

var stageNames = [...]string{
	"creating", "recording", "plugging", "opening", "attached", "lingering", "lost",
	"detaching", "forgetting", "gone", "left",
}

// Stages returns the stages that an attachment can be in: the values of
// [Status].Stage.
func Stages() []string { return slices.Clone(stageNames[:]) }

func (s stage) String() string { return stageNames[s] }

// transition is a change from one stage to another.
type transition struct{ from, to stage }

// transitions are all changes that an attachment may make.
var transitions = []transition{
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

// moveTo changes the stage of the attachment. m.mu is held.
func (a *attachment) moveTo(to stage) {
	step := transition{a.stage, to}
	if !slices.Contains(transitions, step) {
		// A programming error, but no reason to end all backups by a crash.
		a.log.Error("unexpected change of an attachment's stage", "from", a.stage.String(), "to", to.String())
	}
	a.stage = to
	if to >= lost && a.endingSince.IsZero() {
		a.endingSince = time.Now()
	}
	if a.m.onTransition != nil {
		a.m.onTransition(step)
	}
}

// move is moveTo for callers that do not hold m.mu.
func (a *attachment) move(to stage) {
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	a.moveTo(to)
}
