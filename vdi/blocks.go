package vdi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"xapi-nbd/vdi/allocation"
	"xapi-nbd/vdi/vhd"
	"xapi-nbd/xapi"
)

// Blocks summarizes which blocks of an attached VDI have data.
type Blocks struct {
	// Known is true if every other block reads as zeroes as long as the VDI is attached.
	// Otherwise every block may have data.
	Known bool
	// Reason is why Known is false, one of [BlocksReasons]; "" while the images are being
	// read.
	Reason string
	// Data is the number of bytes in blocks with data, if Known.
	Data int64
}

// BlocksReasons are the values of Blocks.Reason besides "", for metrics: those of
// [allocation.Reasons], and
//
//   - "writable": a VM or another host may write the VDI;
//   - "no_record": the storage manager has no record of how the VDI is attached, as for
//     storage without VHD images;
//   - "sharable": the VDI may be attached by several hosts for writing;
//   - "unprotected": this host lets a VDI be attached for writing beside readers;
//   - "xapi": xapi did not return the location of the VDI's image.
var BlocksReasons = append([]string{"writable", "no_record", "sharable", "unprotected", "xapi"}, allocation.Reasons...)

// allowMultipleAttach is the path of the file with which an administrator lets the storage
// manager attach a VDI for writing although others read it.
const allowMultipleAttach = "/etc/xensource/allow_multiple_vdi_attach"

// blocksTimeout bounds the time for finding the blocks of one attachment.
const blocksTimeout = 2 * time.Second

// blocks is the allocation of an attachment. It is read once, right after the device was
// opened: while the VDI is attached its content cannot change, although its images may.
type blocks struct {
	done chan struct{} // closed when the following fields are constant
	set  *vhd.BlockSet // nil if unknown
	Blocks
}

// known returns the blocks with data, or nil if they are not known, or not yet.
func (b *blocks) known() *vhd.BlockSet {
	select {
	case <-b.done:
		return b.set
	default:
		return nil
	}
}

// status returns the summary, which is zero while the images are being read.
func (b *blocks) status() Blocks {
	select {
	case <-b.done:
		return b.Blocks
	default:
		return Blocks{}
	}
}

// findBlocks reads the images of the VDI. It takes milliseconds, at most 2 s. If the
// allocation is not certain, the attachment goes on without it.
//
// sr is the uuid of the VDI's SR. If reason is not "", the blocks cannot be known, and why
// is the error to log.
func (a *attachment) findBlocks(of xapi.VDIRecord, sr, reason string, why error) {
	defer close(a.blocks.done)
	begin := time.Now()
	// When the attachment ends no image may stay open, because that would disturb the
	// detach.
	ctx, cancel := context.WithTimeout(a.lifetime, blocksTimeout)
	defer cancel()
	var set *vhd.BlockSet
	err := why
	if reason == "" {
		set, err = a.readBlocks(ctx, of, sr)
		reason = allocation.Reason(err)
	}
	if err != nil {
		a.blocks.Reason = reason
		if a.lifetime.Err() == nil {
			a.log.Info("all blocks count as data", "reason", reason, "err", err)
		}
	} else {
		a.dev.StopReadingAhead() // the kernel would read holes
		a.blocks.set, a.blocks.Known, a.blocks.Data = set, true, set.Bytes()
		a.log.Info("blocks with data are known", "data", a.blocks.Data, "size", of.VirtualSize, "took", time.Since(begin).Round(time.Millisecond))
	}
	a.m.countBlocks(a.blocks.Blocks)
}

// readBlocks reads the images of the VDI. Its errors are those of allocation.Read.
func (a *attachment) readBlocks(ctx context.Context, of xapi.VDIRecord, sr string) (*vhd.BlockSet, error) {
	return a.m.readMap(ctx, allocation.Source{
		Link:      filepath.Join(a.m.cfg.DeviceDir, "sm", "phy", sr, of.Location),
		Key:       of.Location,
		MapperDir: filepath.Join(a.m.cfg.DeviceDir, "mapper"),
		Size:      of.VirtualSize,
	})
}

// srOf returns the uuid of the VDI's SR, which names the folder of the storage manager's
// link to the image. xapi is asked once for each SR.
func (a *attachment) srOf(ctx context.Context, s *xapi.Session, of xapi.VDIRecord) (string, error) {
	if !filepath.IsLocal(of.Location) || strings.ContainsRune(of.Location, filepath.Separator) {
		return "", fmt.Errorf("the location %q of the VDI names no image", of.Location)
	}
	a.m.mu.Lock()
	uuid, known := a.m.srs[of.SR]
	a.m.mu.Unlock()
	if known {
		return uuid, nil
	}
	ctx, cancel := context.WithTimeout(ctx, blocksTimeout)
	defer cancel()
	sr, err := s.SRRecord(ctx, of.SR)
	if xapi.SessionEnded(err) || answerLost(err) {
		err = a.m.cfg.Local.Do(ctx, func(local *xapi.Session) (err error) {
			sr, err = local.SRRecord(ctx, of.SR)
			return err
		})
	}
	switch {
	case err != nil:
		return "", err
	case !xapi.IsUUID(sr.UUID):
		return "", fmt.Errorf("xapi names no usable SR: %q", sr.UUID)
	}
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	a.m.srs[of.SR] = sr.UUID
	return sr.UUID, nil
}

// hostKey is the prefix of the keys in a VDI's sm_config with which the storage manager
// records how each host has attached it: "RO" or "RW".
const hostKey = "host_"

// checkFrozen returns an error unless the content of a VDI cannot change as long as it is
// attached to this host. The record must have been read after the plug. As long as
// it is attached read-only nobody can attach it for writing: xapi refuses that on the same
// host, and the storage manager on other hosts. reason is one of BlocksReasons if err is not nil.
func checkFrozen(of xapi.VDIRecord, allowMultipleAttach string) (reason string, err error) {
	if of.Sharable {
		return "sharable", errors.New("the VDI is sharable")
	}
	hosts := 0
	for key, mode := range of.SMConfig {
		if !strings.HasPrefix(key, hostKey) {
			continue
		}
		if hosts++; mode != "RO" {
			return "writable", fmt.Errorf("a host has attached the VDI as %q", mode)
		}
	}
	if hosts == 0 {
		return "no_record", errors.New("the storage manager does not tell how the VDI is attached")
	}
	switch _, err := os.Stat(allowMultipleAttach); {
	case err == nil:
		return "unprotected", fmt.Errorf("%s exists", allowMultipleAttach)
	case !errors.Is(err, fs.ErrNotExist):
		return "unprotected", err
	}
	return "", nil
}

// countBlocks counts the result of one attachment for BlocksCounts.
func (m *Manager) countBlocks(b Blocks) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.blocksCounts[b.Reason]++
}

// BlocksCounts returns the number of attachments so far by [Blocks.Reason], "" for those
// whose blocks are known. It has a value for each reason from the start.
func (m *Manager) BlocksCounts() map[string]int64 {
	counts := map[string]int64{"": 0}
	for _, reason := range BlocksReasons {
		counts[reason] = 0
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for reason, n := range m.blocksCounts {
		counts[reason] = n
	}
	return counts
}
