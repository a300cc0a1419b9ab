package main

import (
	"errors"
	"fmt"
	"os"

	"xapi-nbd/mirror"
	"xapi-nbd/mirror/intent"
)

// mirrorState is the file of --state. A nil *mirrorState is none.
type mirrorState struct {
	log  *intent.Log
	file string
}

// openMirrorState opens the file of --state, or makes it. file is "" without --state.
func openMirrorState(file string, primary, secondary side, ends *mirrorEnds) (*mirrorState, error) {
	if file == "" {
		return nil, nil
	}
	first, err := identify(primary, ends.primary.End, false)
	if err != nil {
		return nil, err
	}
	second, err := identify(secondary, ends.secondary.End, false)
	if err != nil {
		return nil, err
	}
	log, err := intent.Open(file, intent.Mirror{Size: first.Size, Primary: first.Name, Secondary: second.Name})
	if err != nil {
		return nil, err
	}
	s := &mirrorState{log, file}
	if s.resumed() && ends.made != "" { // and has an inode that was used before
		return nil, errors.Join(fmt.Errorf("%s does not exist any more; remove %s to copy everything", ends.made, file), s.close())
	}
	return s, nil
}

// resumed reports whether a mirror was interrupted before.
func (s *mirrorState) resumed() bool { return s != nil && s.log.Resumed() }

// addTo makes a mirror use the file.
func (s *mirrorState) addTo(c *mirror.Config) {
	if s != nil {
		c.Intent, c.Dirty = s.log, s.log.Dirty()
	}
}

// undo closes the file of a mirror that did not begin, and removes it if it was made for it. It
// removes it first, while no other process can open it.
func (s *mirrorState) undo() error {
	if s == nil || s.resumed() {
		return s.close()
	}
	return errors.Join(os.Remove(s.file), s.close())
}

func (s *mirrorState) close() error {
	if s == nil {
		return nil
	}
	return s.log.Close()
}
