package vdi

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"xapi-nbd/internal/fsys"
)

// During an upgrade two processes of the service work on one host: the new one, and the old
// one until its last transfer has ended. Each has a generation, a number that no other living
// process has, and an owner, its generation and a random part, which stands in the tags of
// its VBDs. It holds a lock on the file generationPrefix+owner in the state folder as long as
// it lives. So a process can tell the VBDs of a living one from those that were left behind.
const (
	generationPrefix = "gen."
	// newGenerationName is the name of that file until it is locked: under its own name no
	// process ever sees it unlocked, unless its process has ended.
	newGenerationName = "gen.new"
)

// ownerPattern matches the owners that this version and later ones give. Owners are read
// from xapi and become part of a path.
var ownerPattern = regexp.MustCompile(`^([1-9][0-9]{0,8})\.[A-Z2-7]{1,40}$`)

// newOwner returns a new owner with that generation.
func newOwner(generation int) string { return strconv.Itoa(generation) + "." + rand.Text() }

// newNonce returns a nonce for the tag of one VBD. It names the owner, because of a
// VBD.create without a response nothing but the nonce is known.
func newNonce(owner string) string { return owner + "." + rand.Text() }

// ownerOfNonce returns the owner in a nonce; "" for nonces of earlier versions, whose
// processes have ended: they did not work beside another one.
func ownerOfNonce(nonce string) string {
	end := strings.LastIndexByte(nonce, '.')
	if end < 0 || !ownerPattern.MatchString(nonce[:end]) {
		return ""
	}
	return nonce[:end]
}

// generationOf returns the generation of an owner, 0 if it is not one of ours.
func generationOf(owner string) int {
	m := ownerPattern.FindStringSubmatch(owner)
	if m == nil {
		return 0
	}
	n, err := strconv.Atoi(m[1])
	if err != nil {
		return 0
	}
	return n
}

// generations are the living processes of a state folder, found by their locked files. Its
// methods may be called concurrently.
type generations struct {
	fs  fsys.FS
	dir string
}

// begin gives this process a generation above those of all living ones, and returns its
// owner and its lock. It removes the files of processes that have ended. The caller holds
// the lock of the state folder, or has inherited it, so that no two processes call it at the
// same time.
func (g generations) begin() (owner string, lock io.Closer, err error) {
	living, err := g.sweep()
	if err != nil {
		return "", nil, err
	}
	next := 1
	for _, other := range living {
		next = max(next, generationOf(other)+1)
	}
	lock, err = g.fs.Lock(filepath.Join(g.dir, newGenerationName))
	if err != nil {
		return "", nil, fmt.Errorf("generation: %w", err)
	}
	owner = newOwner(next)
	if err := g.fs.Rename(filepath.Join(g.dir, newGenerationName), g.path(owner)); err != nil {
		return "", nil, errors.Join(fmt.Errorf("generation: %w", err), lock.Close())
	}
	return owner, lock, nil
}

// end removes the file of this process and gives up its lock. If the file cannot be removed,
// the next process does it.
func (g generations) end(owner string, lock io.Closer) error {
	_ = g.fs.Remove(g.path(owner))
	return lock.Close()
}

// sweep returns the owners of all living processes and removes the files of the others.
func (g generations) sweep() (living []string, err error) {
	owners, err := g.owners()
	if err != nil {
		return nil, err
	}
	for _, owner := range owners {
		alive, err := g.alive(owner)
		switch {
		case err != nil:
			return nil, err
		case alive:
			living = append(living, owner)
		default:
			if err := g.fs.Remove(g.path(owner)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("generation: %w", err)
			}
		}
	}
	return living, nil
}

// owners returns the owners that have a file.
func (g generations) owners() (all []string, err error) {
	names, err := g.fs.Names(g.dir)
	if err != nil {
		return nil, fmt.Errorf("generation: %w", err)
	}
	for _, name := range names {
		owner, found := strings.CutPrefix(name, generationPrefix)
		if found && ownerPattern.MatchString(owner) {
			all = append(all, owner)
		}
	}
	return all, nil
}

// alive reports whether the process with that owner lives. Owners of earlier versions never
// do.
func (g generations) alive(owner string) (bool, error) {
	if !ownerPattern.MatchString(owner) {
		return false, nil
	}
	alive, err := g.fs.IsLocked(g.path(owner))
	if err != nil {
		return false, fmt.Errorf("generation: %w", err)
	}
	return alive, nil
}

func (g generations) path(owner string) string {
	return filepath.Join(g.dir, generationPrefix+owner)
}

// ofOtherProcess reports whether a VBD with that tag or nonce belongs to another living
// process, which removes it itself.
func (m *Manager) ofOtherProcess(owner, nonce string) (bool, error) {
	for _, o := range []string{owner, ownerOfNonce(nonce)} {
		if o == "" || o == m.owner {
			continue
		}
		if alive, err := m.generations().alive(o); alive || err != nil {
			return alive, err
		}
	}
	return false, nil
}

func (m *Manager) generations() generations { return generations{m.journal.fs, m.journal.dir} }

// Generation returns the number of this process among those of the state folder, from 1; 0
// before Lock has succeeded.
func (m *Manager) Generation() int {
	if !m.locked.Load() {
		return 0
	}
	return generationOf(m.owner)
}

// OtherGenerations returns the generations of the other living processes of the state
// folder. Those are processes that were upgraded and still have transfers.
func (m *Manager) OtherGenerations() ([]int, error) {
	if !m.locked.Load() {
		return nil, ErrNotLocked
	}
	return m.generations().living(m.owner)
}

// LivingGenerations returns the generations of all living processes of a state folder, for a
// process that is none of them. A folder that does not exist has none.
func LivingGenerations(stateDir string) ([]int, error) {
	all, err := generations{fsys.OS{}, stateDir}.living("")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return all, err
}

// living returns the generations of the living processes, except that of one owner.
func (g generations) living(except string) (all []int, err error) {
	owners, err := g.owners()
	if err != nil {
		return nil, err
	}
	for _, owner := range owners {
		if owner == except {
			continue
		}
		alive, err := g.alive(owner)
		if err != nil {
			return nil, err
		}
		if alive {
			all = append(all, generationOf(owner))
		}
	}
	return all, nil
}
