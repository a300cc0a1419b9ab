//go:build linux

package nbd

import "testing"

// Reads from storage one at a time cost no hand-over to another goroutine, which
// takes a good part of the time of such a read.
func TestSingleStorageReadsAreNotHandedOver(t *testing.T) {
	d := newStorageDevice(t)
	nc := storageServer(t, d, false)
	const n = 200
	for range n {
		sendReads(t, nc, 1)
		receiveReads(t, nc, 1)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.handed > 0 || d.readers != n {
		t.Errorf("%d of %d reads were handed over, %d were not; want none and all", d.handed, n, d.readers)
	}
}

// Reads from storage that came together overlap: the reader waits for none of them.
func TestStorageReadsThatArriveTogetherOverlap(t *testing.T) {
	d := newStorageDevice(t)
	release := make(chan struct{})
	d.began, d.released = make(chan struct{}, 8), release
	nc := storageServer(t, d, true)
	sendReads(t, nc, 8)
	for range 8 {
		<-d.began // all of them before one ends
	}
	close(release)
	receiveReads(t, nc, 8)
}

// When the peer turns out to send requests before it has its replies, the reader waits
// for storage no more, until the peer has not done so for a while.
func TestPipelinedStorageReadsOverlap(t *testing.T) {
	d := newStorageDevice(t)
	release := make(chan struct{})
	d.began, d.released = make(chan struct{}, 2), release
	nc := storageServer(t, d, false)
	sendReads(t, nc, 1)
	<-d.began // the reader waits for it
	sendReads(t, nc, 1)
	release <- struct{}{}
	<-d.began
	for range 5 {
		sendReads(t, nc, 1)
		<-d.began // although the one before has not ended
		release <- struct{}{}
		receiveReads(t, nc, 1)
	}
	close(release)
	receiveReads(t, nc, 2)
	d.mu.Lock()
	if d.readers != 1 {
		t.Errorf("the reader waited for storage %d times, want once", d.readers)
	}
	d.mu.Unlock()
	for range pipelinedReads + 1 {
		sendReads(t, nc, 1)
		<-d.began
		receiveReads(t, nc, 1)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.readers < 2 {
		t.Error("single reads are still handed over")
	}
}

// A slow device holds nothing up: requests that come while the reader waits for
// storage are read and served.
func TestRequestsAreReadWhileStorageStalls(t *testing.T) {
	d := newStorageDevice(t)
	release := make(chan struct{})
	d.began, d.released = make(chan struct{}, 4), release
	nc := storageServer(t, d, true)
	for range 4 {
		sendReads(t, nc, 1)
		<-d.began
	}
	close(release)
	receiveReads(t, nc, 4)
}
