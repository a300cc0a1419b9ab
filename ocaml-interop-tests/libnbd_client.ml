(* An NBD client made of libnbd's bindings for OCaml. It does what its arguments
   say and prints one fact per line; the test that started it compares. *)

open Printf

let usage =
  {|libnbd_client version
libnbd_client list URI
libnbd_client names URI NAME...
libnbd_client facts HOW URI
libnbd_client copy HOW URI FILE PIECE DEPTH
libnbd_client reads HOW URI OFFSET:LENGTH...
libnbd_client writes HOW URI

HOW is go, go-simple, export-name or export-name-no-zeroes.
|}

let errno = function
  | None -> "none"
  | Some Unix.EPERM -> "EPERM"
  | Some Unix.ENOENT -> "ENOENT"
  | Some Unix.EIO -> "EIO"
  | Some Unix.ENOMEM -> "ENOMEM"
  | Some Unix.EINVAL -> "EINVAL"
  | Some Unix.ENOSPC -> "ENOSPC"
  | Some Unix.EOPNOTSUPP -> "ENOTSUP"
  | Some e -> Unix.error_message e

(* Prints the result of a function that may fail. *)
let attempt what f =
  match f () with
  | answer -> printf "%s: %s\n%!" what answer
  | exception NBD.Error (_, e) -> printf "%s: %s\n%!" what (errno e)

(* libnbd asks with GO where both sides speak fixed newstyle. If the client does
   not say that it does, only EXPORT_NAME is left to it. *)
let prepare nbd how =
  let open NBD.HANDSHAKE_FLAG in
  match how with
  | "go" -> NBD.set_handshake_flags nbd [ FIXED_NEWSTYLE; NO_ZEROES ]
  | "go-simple" ->
      NBD.set_handshake_flags nbd [ FIXED_NEWSTYLE; NO_ZEROES ];
      NBD.set_request_structured_replies nbd false
  | "export-name" -> NBD.set_handshake_flags nbd []
  | "export-name-no-zeroes" -> NBD.set_handshake_flags nbd [ NO_ZEROES ]
  | _ -> failwith ("no way to open an export: " ^ how)

let connect nbd uri =
  (* Without this libnbd refuses URIs that name a folder of certificates. *)
  NBD.set_uri_allow_local_file nbd true;
  NBD.connect_uri nbd uri

(* Runs f on an export that is open, and leaves in peace. *)
let with_export how uri f =
  NBD.with_handle (fun nbd ->
      prepare nbd how;
      connect nbd uri;
      f nbd;
      NBD.shutdown nbd)

let list uri =
  let count = ref 0 in
  NBD.with_handle (fun nbd ->
      NBD.set_opt_mode nbd true;
      connect nbd uri;
      attempt "listed" (fun () ->
          let each name description =
            incr count;
            printf "export %d: %s|%s\n" !count name description;
            0
          in
          string_of_int (NBD.opt_list nbd each));
      NBD.opt_abort nbd)

(* Asks for one export after the other on one connection until one opens. *)
let names uri wanted =
  let rec ask nbd = function
    | [] -> NBD.opt_abort nbd
    | name :: rest -> (
        NBD.set_export_name nbd name;
        match NBD.opt_go nbd with
        | () ->
            printf "%s: %Ld\n" name (NBD.get_size nbd);
            NBD.shutdown nbd
        | exception NBD.Error (_, e) ->
            printf "%s: %s\n" name (errno e);
            ask nbd rest)
  in
  NBD.with_handle (fun nbd ->
      NBD.set_opt_mode nbd true;
      connect nbd uri;
      ask nbd wanted)

let facts nbd =
  printf "size: %Ld\n" (NBD.get_size nbd);
  printf "read-only: %b\n" (NBD.is_read_only nbd);
  printf "multi-conn: %b\n" (NBD.can_multi_conn nbd);
  printf "protocol: %s\n" (NBD.get_protocol nbd);
  printf "structured: %b\n" (NBD.get_structured_replies_negotiated nbd);
  printf "tls: %b\n" (NBD.get_tls_negotiated nbd)

(* The pieces of a disk in an order that no server can foresee, the same ones
   each time. *)
let shuffled_pieces size piece =
  let state = Random.State.make [| size; piece |] in
  let count = (size + piece - 1) / piece in
  List.init count (fun i -> (i * piece, min piece (size - (i * piece))))
  |> List.map (fun p -> (Random.State.bits state, p))
  |> List.sort compare |> List.map snd

(* Reads the whole disk with depth requests in flight and stores every piece at
   its place in the file. *)
let copy file piece depth nbd =
  let out = open_out_bin file in
  let failed = ref 0 and deepest = ref 0 in
  let store offset buf err =
    if !err <> 0 then incr failed
    else begin
      seek_out out offset;
      output_bytes out (NBD.Buffer.to_bytes buf)
    end;
    1 (* the command is done with *)
  in
  let rec submit = function
    | (offset, length) :: rest when NBD.aio_in_flight nbd < depth ->
        let buf = NBD.Buffer.alloc length in
        let completion = store offset buf in
        ignore (NBD.aio_pread nbd buf (Int64.of_int offset) ~completion);
        submit rest
    | rest -> rest
  in
  let rec run pieces =
    let pieces = submit pieces in
    let in_flight = NBD.aio_in_flight nbd in
    deepest := max !deepest in_flight;
    if in_flight > 0 then begin
      ignore (NBD.poll nbd (-1));
      run pieces
    end
  in
  run (shuffled_pieces (Int64.to_int (NBD.get_size nbd)) piece);
  close_out out;
  printf "deepest: %d\nfailed: %d\n" !deepest !failed

(* With strictness off libnbd also sends invalid requests. *)
let lenient nbd = NBD.set_strict_mode nbd []

let reads ranges nbd =
  lenient nbd;
  let read range =
    attempt range (fun () ->
        Scanf.sscanf range "%Ld:%d" (fun offset length ->
            let buf = Bytes.create length in
            NBD.pread nbd buf offset;
            Digest.to_hex (Digest.bytes buf)))
  in
  List.iter read ranges

let writes nbd =
  lenient nbd;
  let refused what f = attempt what (fun () -> f (); "done") in
  refused "write" (fun () -> NBD.pwrite nbd (Bytes.make 512 'x') 0L);
  refused "write zeroes" (fun () -> NBD.zero nbd 512L 0L);
  refused "trim" (fun () -> NBD.trim nbd 512L 0L)

let version () =
  NBD.with_handle (fun nbd ->
      printf "libnbd: %s\nocaml: %s\n" (NBD.get_version nbd) Sys.ocaml_version)

let run = function
  | [ "version" ] -> version ()
  | [ "list"; uri ] -> list uri
  | "names" :: uri :: wanted -> names uri wanted
  | [ "facts"; how; uri ] -> with_export how uri facts
  | [ "copy"; how; uri; file; piece; depth ] ->
      with_export how uri (copy file (int_of_string piece) (int_of_string depth))
  | "reads" :: how :: uri :: ranges -> with_export how uri (reads ranges)
  | [ "writes"; how; uri ] -> with_export how uri writes
  | _ ->
      prerr_string usage;
      exit 2

let () =
  try run (List.tl (Array.to_list Sys.argv))
  with NBD.Error (text, e) ->
    printf "error: %s: %s\n" (errno e) text;
    exit 1
