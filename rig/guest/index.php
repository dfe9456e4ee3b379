<!DOCTYPE html>
<title>plover</title>
<p>A protected guest.
<table>
<?php
// Some work per page, the same each time.
for ($row = 0; $row < 20; $row++) {
    $sum = md5("row $row");
    echo "<tr><td>$row<td>$sum<td>", strtoupper(substr($sum, 0, 8)), "\n";
}
?>
</table>
