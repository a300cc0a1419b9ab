// Package zerocopy sends parts of a file to a socket without copying them through this
// process, with splice(2) and pipes, and finds out which parts of a file are in the page
// cache, so that reading them does not wait for storage.
//
// [File.Fill] moves data from the file to [Pipes], and [Sender.Send] from the Pipes to the
// socket. The two steps are separate because a caller must have read all data before it
// sends the header of a reply with the data.
//
// It does not know the NBD protocol, requests, devices or TLS. On systems other than
// Linux, [NewFile] and [NewSender] return nil, and callers read and write instead.
package zerocopy
